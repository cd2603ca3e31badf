"""The moving parts: the way of a request, dispatcher, endpoints, prober, delivery."""

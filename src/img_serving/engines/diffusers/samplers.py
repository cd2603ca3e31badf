"""Samplers and noise schedules by the names that people know, as diffusers' schedulers; only what fits a model is offered.

The table of names is that of diffusers' own page on schedulers
(https://huggingface.co/docs/diffusers/api/schedulers/overview), whose names are A1111's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from img_serving.domain.vocabulary import Vocabulary

OWN: Final = "Automatic"
"""The schedule that leaves everything as the model has it."""

_SCHEDULES: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "Karras": {"use_karras_sigmas": True},
        "Exponential": {"use_exponential_sigmas": True},
        "Beta": {"use_beta_sigmas": True},
        "SGM Uniform": {"timestep_spacing": "trailing"},
    }
)
_NEED_SCIPY: Final = frozenset({"LMS", "Beta"})
_SIGMAS: Final = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True, slots=True)
class _Sampler:
    """A class of diffusers' by its name, and what makes it this sampler."""

    scheduler: str
    change: Mapping[str, Any] = field(default_factory=dict)


_FOR_NOISE: Final[Mapping[str, _Sampler]] = MappingProxyType(
    {
        "Euler": _Sampler("EulerDiscreteScheduler"),
        "Euler a": _Sampler("EulerAncestralDiscreteScheduler"),
        "Heun": _Sampler("HeunDiscreteScheduler"),
        "LMS": _Sampler("LMSDiscreteScheduler"),
        "DPM2": _Sampler("KDPM2DiscreteScheduler"),
        "DPM2 a": _Sampler("KDPM2AncestralDiscreteScheduler"),
        "DPM++ 2M": _Sampler("DPMSolverMultistepScheduler"),
        "DPM++ 2M SDE": _Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "DPM++ 2S": _Sampler("DPMSolverSinglestepScheduler"),
        "DDIM": _Sampler("DDIMScheduler"),
        "DDPM": _Sampler("DDPMScheduler"),
        "PNDM": _Sampler("PNDMScheduler", {"skip_prk_steps": True}),  # the others need four steps at least
        "DEIS": _Sampler("DEISMultistepScheduler"),
        "UniPC": _Sampler("UniPCMultistepScheduler"),
        "LCM": _Sampler("LCMScheduler"),
        "TCD": _Sampler("TCDScheduler"),
    }
)
"""For models that predict noise. DPM++ SDE is missing: its noise does not come from the pictures' own generators."""

_FLOW: Final = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_FOR_FLOW: Final[Mapping[str, _Sampler]] = MappingProxyType(
    {
        "Euler": _Sampler("FlowMatchEulerDiscreteScheduler"),
        "Heun": _Sampler("FlowMatchHeunDiscreteScheduler"),
        "DPM++ 2M": _Sampler("DPMSolverMultistepScheduler", _FLOW),
        "UniPC": _Sampler("UniPCMultistepScheduler", _FLOW),
    }
)
"""For models that predict a flow. LCM is missing: pipelines do not hand it the pictures' generators."""

_ALIASES: Final = {
    "Euler ancestral": "Euler a",
    "k_euler": "Euler",
    "k_euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "k_dpmpp_2m": "DPM++ 2M",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "PLMS": "PNDM",
    "uni_pc": "UniPC",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampler and a schedule, by their own names; None: the model's own."""

    sampler: str | None = None
    schedule: str | None = None


class Samplers:
    """What one model can be sampled with. A scheduler is made anew for each drawing, for it carries state."""

    def __init__(self, own: Any, *, takes_sigmas: bool) -> None:
        """`own` is the model's scheduler; `takes_sigmas`: its pipeline computes them itself, as Flux's does."""
        self._own = own
        self._table = _table_for(own, takes_sigmas=takes_sigmas)
        pairs = {
            f"{name} {schedule}": Choice(name, schedule)
            for name in self._table
            for schedule in ("Karras", "Exponential")
            if self._fits(name, schedule)
        }
        self._choices = {name: Choice(name) for name in self._table} | pairs
        self.samplers = Vocabulary(
            self._choices, {alias: name for alias, name in _ALIASES.items() if name in self._table}
        )
        schedules = [name for name in _SCHEDULES if any(self._fits(sampler, name) for sampler in self._table)]
        self.schedules = Vocabulary([OWN, *schedules], {"sgm_uniform": "SGM Uniform", "default": OWN})

    def choose(self, sampler: str | None, schedule: str | None, *, edits: bool = False) -> Choice:
        """What is meant by these names, however spelled. `edits`: it is for a picture that is there already.

        Raises:
            ValueError: the model has none of that name, or the two do not go together.
        """
        choice = Choice()
        if sampler is not None:
            found = self.samplers.find(sampler)
            if found is None:
                raise ValueError(f"the model has no such sampler; {self.samplers.hint(sampler)}")
            choice = self._choices[found]
            if edits and choice.sampler is not None and not self._edits(choice.sampler):
                fitting = ", ".join(name for name in self._table if self._edits(name))
                raise ValueError(f"sampler {found} cannot start from a picture; those that can: {fitting}")
        if schedule is None:
            return choice
        own_schedule = self.schedules.find(schedule)
        if own_schedule is None:
            raise ValueError(f"the model has no such scheduler; {self.schedules.hint(schedule)}")
        if own_schedule == OWN:
            return choice
        if not self._fits(choice.sampler, own_schedule):
            fitting = ", ".join(name for name in self._table if self._fits(name, own_schedule))
            raise ValueError(f"scheduler {own_schedule} does not go with this sampler, but with: {fitting}")
        return Choice(choice.sampler, own_schedule)

    def make(self, choice: Choice) -> Any:
        """A new scheduler."""
        import diffusers

        entry = None if choice.sampler is None else self._table[choice.sampler]
        made = type(self._own) if entry is None else getattr(diffusers, entry.scheduler)
        change = dict(_SCHEDULES[choice.schedule]) if choice.schedule is not None else {}
        if entry is not None:
            change |= entry.change
            if entry.change.get("use_flow_sigmas"):
                change["flow_shift"] = self._own.config.get("shift", 1.0)
        if change.keys() & set(_SIGMAS):  # at most one of them may be set
            change = {name: False for name in _SIGMAS if name in _parameters(made)} | change
        return made.from_config(self._own.config, **change)

    def _edits(self, sampler: str) -> bool:
        """Pipelines of flow models lay noise on a picture through their scheduler; solvers made for noise cannot do it."""
        return not self._table[sampler].change.get("use_flow_sigmas")

    def _fits(self, sampler: str | None, schedule: str) -> bool:
        import diffusers

        if schedule in _NEED_SCIPY and importlib.util.find_spec("scipy") is None:
            return False
        if sampler is None:
            return _SCHEDULES[schedule].keys() <= _parameters(type(self._own))
        entry = self._table[sampler]
        if entry.change.get("use_flow_sigmas"):  # it has the flow's sigmas, or those of a schedule for noise
            return False
        return _SCHEDULES[schedule].keys() <= _parameters(getattr(diffusers, entry.scheduler))


def _table_for(own: Any, *, takes_sigmas: bool) -> dict[str, _Sampler]:
    import diffusers

    if type(own).__name__ == "FlowMatchEulerDiscreteScheduler":
        # Solvers of other families take a pipeline's shift only as theirs is dynamic, and Heun takes none
        dynamic = bool(own.config.get("use_dynamic_shifting"))
        names = ["Euler"]
        if not takes_sigmas and not dynamic:
            names += ["Heun", "DPM++ 2M", "UniPC"]
        elif takes_sigmas and dynamic:
            names += ["DPM++ 2M", "UniPC"]
        return {name: _FOR_FLOW[name] for name in names}
    predicts = own.config.get("prediction_type", "epsilon")
    if predicts not in {"epsilon", "v_prediction"} or own.config.get("use_flow_sigmas"):
        return {}
    compatible = set(getattr(own, "_compatibles", ()))
    if "EulerDiscreteScheduler" not in compatible:
        return {}
    extra = {"LCMScheduler", "TCDScheduler"}
    has_scipy = importlib.util.find_spec("scipy") is not None
    return {
        name: entry
        for name, entry in _FOR_NOISE.items()
        if entry.scheduler in compatible | extra
        and hasattr(diffusers, entry.scheduler)
        and (has_scipy or name not in _NEED_SCIPY)
    }


def _parameters(scheduler: type) -> set[str]:
    """The names of what a scheduler's constructor takes."""
    import inspect

    return set(inspect.signature(scheduler.__init__).parameters)  # type: ignore[misc] # its own constructor, not a mixin's

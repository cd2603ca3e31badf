"""The lexicon: which English and Korean words the painter understands, and the hues of the colour words.

All of it is data; `words.py` reads texts with it.
"""

from __future__ import annotations

from img_serving.engines.procedural.colours import Colour

LEXICON: dict[str, str] = {
    # colours
    "red": "red crimson scarlet ruby cherry 빨간 빨강 빨갛 붉은 붉게 적색 진홍 다홍 autumn maple 단풍",
    "orange": "orange amber tangerine copper 주황 주홍 오렌지 autumn 가을 단풍",
    "yellow": "yellow lemon 노란 노랑 노랗 황색 레몬 개나리 유채",
    "gold": "gold golden honey 금색 금빛 황금 골드",
    "green": "green emerald jade lime olive 초록 녹색 연두 푸른숲 에메랄드 청록",
    "cyan": "cyan teal turquoise aqua 청록 하늘색 옥색 민트 mint",
    "blue": "blue azure navy sapphire cobalt indigo 파란 파랑 파랗 푸른 푸르 남색 청색 쪽빛",
    "purple": "purple violet lavender lilac magenta 보라 자주 자주색 라벤더 lavenders",
    "pink": "pink rose blush sakura 분홍 핑크 장미 벚꽃 연분홍",
    "white": "white ivory pearl 하얀 하양 하얗 흰 흰색 백색 순백",
    "black": "black ebony obsidian 검은 검정 까만 까맣 흑색",
    "brown": "brown sepia chocolate bronze 갈색 밤색 고동색 세피아",
    "grey": "grey gray silver 회색 은색 은빛 잿빛",
    # times of day
    "day": "day daylight noon midday daytime sunny summer 낮 한낮 대낮 정오 여름 맑은",
    "dawn": "dawn sunrise morning daybreak 새벽 일출 아침 여명 해돋이 동틀 봄날",
    "sunset": "sunset sundown evening 노을 석양 일몰 저녁 해질 저녁노을",
    "dusk": "dusk twilight gloaming nightfall 황혼 땅거미 어스름 해거름 박명",
    "night": "night midnight nocturnal nighttime moonlit moonlight starry 밤 한밤 야경 야간 심야 밤하늘 달밤 달빛 별빛",
    # things that are painted where they belong; before the places, so that a colour word finds the thing first
    "lighthouse": "lighthouse beacon 등대",
    # places
    "sea": "sea ocean seascape coast beach shore waves wave lagoon island bay harbor harbour pier "
    "바다 대양 해변 바닷가 해안 파도 섬 물결 항구 부두",
    "lake": "lake river stream pond water waterfall reflection reflections fjord lakeside "
    "호수 강 강가 개울 연못 물 물가 폭포 반영 호숫가",
    "beach": "beach shore seashore 해변 바닷가 모래사장",
    "mountain": "mountain mount alps alpine peak peaks cliff fjord himalaya everest waterfall "
    "산 산맥 봉우리 설산 산봉우리 절벽 폭포 알프스",
    "hills": "hill countryside valley field fields grassland landscape 언덕 들판 골짜기 계곡 초원 시골 풍경",
    "forest": "forest woods woodland tree trees pine jungle taiga 숲 나무 소나무 침엽수 밀림 정글 산림",
    "city": "city town skyline cityscape urban skyscraper metropolis cyberpunk seoul tokyo "
    "도시 시내 서울 빌딩 고층 마천루 야경 도심",
    "desert": "desert dune sahara sand 사막 모래 모래언덕 사구 사하라",
    "flower": "flower floral blossom bloom tulip daisy garden park meadow poppy rose lavender sakura "
    "꽃 꽃밭 벚꽃 장미 튤립 정원 공원 들꽃 코스모스 라벤더 개나리 유채",
    "sky": "sky skies heaven 하늘 창공 밤하늘",
    "space": "space nebula galaxy cosmos cosmic universe outer interstellar 우주 은하 성운 은하계 갤럭시",
    "planet": "planet saturn jupiter mars ringed 행성 토성 목성 화성",
    "abstract": "abstract marble fluid swirl pattern silk ink psychedelic 추상 추상화 대리석 무늬 소용돌이 패턴",
    # things that are not painted, but that belong to a place
    "boat": "boat ship sailboat yacht sail ferry 배 돛단배 조각배 나룻배 요트 선박 범선",
    "whale": "whale dolphin fish shark seagull gull 고래 돌고래 물고기 상어 갈매기",
    "bridge": "bridge 다리 교량 duck swan 오리 백조",
    "castle": "castle fortress palace temple dragon eagle 성 고성 성곽 궁전 사원 용 독수리",
    "tower": "tower street road car train cafe robot 탑 타워 거리 도로 자동차 기차 카페 로봇",
    "house": "house home cottage cabin hut barn farm village 집 오두막 초가집 한옥 시골집 농장 마을",
    "pet": "cat kitten dog puppy rabbit butterfly bird 고양이 강아지 토끼 나비 새끼고양이",
    "grazer": "horse cow sheep 조랑말 젖소 양떼",
    "fox": "fox wolf deer bear owl squirrel 여우 늑대 사슴 부엉이 올빼미 다람쥐",
    "camel": "camel pyramid cactus 낙타 피라미드 선인장",
    "rocket": "rocket spaceship astronaut alien ufo 로켓 우주선 우주인 외계인",
    # lights and weather
    "sun": "sun sunlight sunshine 태양 햇살 햇빛 해",
    "moon": "moon moonlit moonlight crescent lunar 달 보름달 달빛 달밤 초승달 반달",
    "stars": "star starry starlight constellation milkyway 별 별빛 별들 별자리 은하수 별이",
    "aurora": "aurora borealis northern-lights 오로라 극광",
    "clouds": "cloud cloudy overcast cumulus storm stormy rain rainy rainfall drizzle "
    "비 봄비 빗속 빗줄기 소나기 장마 비오는 구름 먹구름 뭉게구름 흐린 폭풍",
    "mist": "mist misty fog foggy haze hazy rain rainy drizzle 비 봄비 빗속 장마 비오는 안개 물안개 연무 아지랑이",
    "snow": "snow snowy winter ice frozen glacier blizzard 눈 눈밭 눈꽃 겨울 설산 설경 얼음 빙하 눈보라",
    "fireflies": "firefly fireflies lantern lanterns magical 반딧불 반딧불이 등불 풍등",
    # moods and styles
    "minimal": "minimal minimalist minimalism simple clean 미니멀 단순한 간결한 심플",
    "watercolor": "watercolor watercolour aquarelle 수채화 수채",
    "neon": "neon synthwave cyberpunk retrowave vaporwave 네온 사이버펑크",
    "pastel": "pastel soft gentle 파스텔 부드러운 은은한",
    "dark": "dark gloomy moody gothic noir 어두운 어둡 음산한 캄캄한",
    "vivid": "vivid vibrant colorful colourful saturated 선명한 화려한 강렬한",
    "mono": "monochrome noir greyscale grayscale 흑백 모노크롬 수묵화 수묵",
    "dreamy": "dreamy dream ethereal fantasy magical surreal 몽환 몽환적 꿈 꿈같은 환상",
    "vintage": "vintage retro nostalgic 빈티지 레트로 옛날",
}
"""What the painter understands: a sense, and the words (English stems, Korean stems) that carry it."""

HUES: dict[str, Colour] = {
    "red": (0.86, 0.11, 0.13),
    "orange": (0.96, 0.48, 0.12),
    "yellow": (0.98, 0.84, 0.20),
    "gold": (0.92, 0.68, 0.26),
    "green": (0.14, 0.62, 0.28),
    "cyan": (0.12, 0.72, 0.74),
    "blue": (0.13, 0.34, 0.86),
    "purple": (0.50, 0.20, 0.78),
    "pink": (0.96, 0.48, 0.66),
    "white": (0.95, 0.96, 0.98),
    "black": (0.05, 0.05, 0.07),
    "brown": (0.45, 0.28, 0.17),
    "grey": (0.50, 0.52, 0.55),
}
TIMES = ("day", "dawn", "sunset", "dusk", "night")
PLACES = ("sea", "lake", "mountain", "hills", "forest", "city", "desert", "flower", "sky", "space", "abstract")
HOMES: dict[str, tuple[str, ...]] = {
    "boat": ("sea",),
    "whale": ("sea",),
    "bridge": ("lake", "hills"),
    "castle": ("mountain", "forest"),
    "tower": ("city",),
    "house": ("hills",),
    "pet": ("flower",),
    "grazer": ("hills",),
    "fox": ("forest",),
    "camel": ("desert",),
    "rocket": ("space",),
}
"""Where a thing belongs that no word has put anywhere."""

STYLES = ("minimal", "watercolor", "neon", "pastel", "dark", "vivid", "mono", "dreamy", "vintage")

_ENDINGS = """
    이 가 은 는 을 를 의 에 에서 와 과 도 로 으로 에는 에게 위 위에 위의 위로 속 속의 속에
    아래 들 들이 들의 빛 색 색의 빛의 이다 있는 까지 부터
    처럼 같은 앞 앞의 뒤 옆 옆의 사이 가득한 인 한 게 고 진 적 적인 풍 풍의
"""
PARTICLES = frozenset(_ENDINGS.split())
"""What may follow a Korean stem without changing what it means here."""

ENGLISH_ENDINGS = ("s", "es", "y", "ish", "lit", "side", "scape")
"""What may follow an English stem likewise."""

LOOKALIKES = frozenset(("눈물", "눈빛", "해물", "산물", "배색", "성인", "성적", "성과", "집게"))
"""Made of known syllables, but about something else: tears, a gaze, seafood, a product, an adult, tongs …"""

_SMALL_WORDS = """
    a an the of in on at by with and or over under to from is are it its as for into near very beautiful
    그 저 및 아주 매우
"""
STOP_WORDS = frozenset(_SMALL_WORDS.split())
"""Words that bend nothing."""

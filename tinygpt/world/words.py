"""The words of the world. No option of a choice is the beginning of another one: text is unambiguous.

Words after "a" begin with a consonant. Korean adjectives have the form before a noun, and each fits each noun
here. Each word has one translation.
"""

from typing import NamedTuple

Words = tuple[str, ...]


def _words(text: str) -> Words:
    return tuple(text.split())


def _phrases(text: str) -> Words:
    return tuple(text.split("|"))


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


class Attribute(NamedTuple):
    """An attribute of each person. `wordings` stand between a name and the value; `questions` ask for it."""

    name: str
    values: Words
    wordings: Words
    questions: Words


CITY = Attribute("city", _words(
    "Paris London Tokyo Cairo Lima Oslo Rome Delhi Seoul Berlin Madrid Athens Dublin Lagos Sydney Boston"),
    _phrases("lives in|rents a flat in|moved to|settled in|votes in|calls home the city of"),
    _phrases("Where does {} live?|In which city does {} live?|What city does {} call home?|"
             "Which city did {} move to?|Where has {} settled?"))  # fmt: skip
JOB = Attribute("job", _words(
    "baker doctor teacher farmer lawyer nurse pilot painter singer writer dentist plumber gardener driver "
    "tailor waiter"),
    _phrases("works as a|does the job of a|trained as a|is employed as a|found work as a|"
             "makes a living as a"),
    _phrases("What does {} work as?|What is the job of {}?|How does {} make a living?|What did {} train as?|"
             "As what is {} employed?"))  # fmt: skip
PET = Attribute("pet", _words(
    "cat dog rabbit parrot turtle hamster goat pony lizard snake goldfish duck ferret mouse pigeon hen"),
    _phrases("has a|keeps a|feeds a|adopted a|took as a pet a|looks after a"),
    _phrases("What pet does {} have?|Which animal does {} keep?|What is the pet of {}?|"
             "Which animal did {} adopt?|What pet does {} look after?"))  # fmt: skip
FOOD = Attribute("food", _words(
    "noodles bread cheese soup rice pasta salad pizza curry fish honey pancakes dumplings sausages chocolate "
    "kimchi"),
    _phrases("likes|loves|names as favourite food|often cooks|always orders|never refuses"),
    _phrases("What does {} like to eat?|Which food does {} love?|What is the favourite food of {}?|"
             "What does {} often cook?|Which dish does {} always order?"))  # fmt: skip


class Lexicon(NamedTuple):
    """All words of a world. Tests use fewer words, and enumerate all documents of such a world."""

    women: Words = _words(
        "Nora Clara Ruth Edith Alice Grace Ingrid Irene Julia Laura Maria Naomi Olivia Paula Rosa "
        "Sarah Tessa Vera Wanda Emma Fiona Hazel Judith Diana")
    men: Words = _words(
        "Adam Boris Caleb David Edgar Felix George Arthur Ivan James Kevin Leo Martin Nathan Oscar "
        "Peter Hugo Robert Simon Thomas Victor Walter Daniel Frank")
    surnames: Words = _words(
        "Abbott Barnes Carver Dalton Ellis Foster Garner Harper Ingram Jensen Keller Lowell Mercer "
        "Norton Osborn Palmer Quinn Ramsey Sutton Tanner Vaughn Walsh Young Zeller Archer Bennett "
        "Collins Dawson Eaton Fisher Graham Hughes Irving Jarvis Kirby Lambert Morris Nolan Parker "
        "Reeves Shaw Tucker Upton Vance Wilder Hardy Brooks Monroe")
    attributes: tuple[Attribute, ...] = (CITY, JOB, PET, FOOD)
    categories: tuple[dict[str, str], ...] = (  # English to Korean, by kind of thing
        _pairs("apple 사과 grape 포도 peach 복숭아 strawberry 딸기 watermelon 수박 banana 바나나"),
        _pairs("cat 고양이 dog 개 rabbit 토끼 tiger 호랑이 bear 곰 fox 여우"),
        _pairs("hat 모자 shoes 신발 socks 양말 skirt 치마 trousers 바지 gloves 장갑"),
        _pairs("chair 의자 desk 책상 bed 침대 sofa 소파 wardrobe 옷장 bookshelf 책장"),
        _pairs("car 자동차 bus 버스 train 기차 bicycle 자전거 truck 트럭 plane 비행기"),
        _pairs("hammer 망치 saw 톱 knife 칼 scissors 가위 needle 바늘 ladder 사다리"),
        _pairs("river 강 mountain 산 sea 바다 forest 숲 lake 호수 island 섬"),
        _pairs("house 집 school 학교 hospital 병원 library 도서관 church 교회 factory 공장"),
    )
    adjectives: dict[str, str] = _pairs(
        "red 빨간 blue 파란 white 하얀 black 검은 yellow 노란 big 큰 small 작은 new 새 pretty 예쁜 "
        "clean 깨끗한 dirty 더러운 strange 이상한 expensive 비싼 famous 유명한 good 좋은 heavy 무거운")
    labels: Words = _words("dax wug zib mep fop gick tove blick pim sarn lorp quib tam neff rulo kag")
    reviewed: Words = _words("room hotel view band coffee service garden breakfast")
    good: Words = _words("wonderful great lovely perfect superb charming splendid fine")
    bad: Words = _words("terrible horrible dreadful poor disappointing shabby nasty lousy")
    reviews: Words = (  # with | before and after each word to fill in
        "The |subject| was |adjective|.", "We found the |subject| |adjective|.",
        "I thought the |subject| was |adjective|.", "What a |adjective| |subject|!")
    polarities: tuple[Words, Words] = (("positive", "good", "happy"), ("negative", "bad", "unhappy"))
    stations: Words = _words(
        "Ashford Bexley Camden Dover Epping Fairview Hampton Kingston Langley Milton Newbury Oakwood "
        "Preston Redhill Stratford Tilbury Wembley Yarmouth Marlow Chester Brighton Derby Exeter Lincoln")
    lines: Words = _words("red blue green")  # fmt: skip

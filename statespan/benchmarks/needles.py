"""The wording of the retrieval tasks, shared by the benchmarks and by the training rows of the shipped models.

A task is an intro, a context in which needles stand as whole sentences, a question, and a cue that begins the answer;
`prompt` lays them out. The tasks are those of RULER (NVIDIA/RULER@c3f5e3b) and of DeciMamba's passkey retrieval
(DeciMamba@6290e95); sentences and word lists are our own, so scores are not comparable with published ones.

Models are taught to answer with the values alone, or, where several keys are asked for, with `key: value` pairs, and to
end the answer with a newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

Kind = Literal["number", "word", "code"]
"""What a named key stands for: 7 digits, an adjective-noun pair, or a 128-bit code in hexadecimal."""

PASSKEY_INTRO = "A pass key is hidden in the text below. Find it and remember it."
PASSKEY_NEEDLE = "The pass key is {value}. Remember it: the pass key is {value}."
PASSKEY_QUESTION = "What is the pass key?"
PASSKEY_CUE = "The pass key is"

NAMED_INTRO = "Some special magic {kind}s are hidden in the text below. Remember them."
NAMED_NEEDLE = "The special magic {kind} for {key} is: {value}."
NAMED_QUESTION = "What is the special magic {kind} for {key}?"
NAMED_CUE = "The special magic {kind} for {key} is:"
SEVERAL_QUESTION = "What are the special magic {kind}s for {key}?"
SEVERAL_CUE = "The special magic {kind}s for {key} are:"

TRACKING_INTRO = "The text below sets variables. Follow the assignments."
TRACKING_VALUE = "VAR {name} = {value}."
TRACKING_COPY = "VAR {name} = VAR {source}."
TRACKING_QUESTION = "Which variables hold the value {value}?"
TRACKING_CUE = "The variables that hold {value} are:"

COMMON_INTRO = "Below is a numbered list of words. Some of them come up more often than the others."
COMMON_QUESTION = "Which {count} words are the most common in the list?"
COMMON_CUE = "The most common words are:"

FREQUENT_INTRO = "Below is a text of coded words. Count how often each comes up; leave out the dots."
FREQUENT_QUESTION = "Which {count} coded words are the most frequent?"
FREQUENT_CUE = "The most frequent words are:"

NOISE = (
    "The lamp is lit. The road is long. The rain has stopped at last. A dog sleeps by the door. Nobody is in a hurry."
)
"""One line of the repeated filler, RULER's "noise" haystack."""

# Everyday words; the shipped tokenizer holds nearly all of them as one token after a space or a hyphen.
ADJECTIVES = tuple(
    """able ample amber ancient angry ashen austere autumn awake azure bare bent bitter black blank bleak blind blond
    blue blunt bold brave brazen brief bright brisk broad broken bronze brown calm candid careful cheap cheery chief
    chilly civic clean clear clever cloudy clumsy coarse cold common cool copper coral cosmic cosy crimson crisp crooked
    curious curly cyan damp dapper daring dark deaf dear decent deep dense dim distant dizzy double drowsy dry dull dusty
    eager early earnest eastern easy elder empty equal eternal even exact faded faint fair false famous fancy fast fat
    feeble fertile fierce final fine firm fleet floral fluffy fond formal fragile frank free fresh frosty frozen frugal
    full funny gaudy gentle giant gifted glad gloomy glossy golden good grand grave gray greedy green grim guilty handy
    happy hard harsh hasty hazel heavy hidden high hollow holy honest hot huge humble hungry husky icy idle inner ivory
    jolly keen kind lame large late lazy lean level light little lively lofty lone long loose loud loyal lucky lunar mad
    magic major marble mellow merry mighty mild minor misty mobile modern modest moist moral muddy narrow neat nervous
    new nimble noble noisy northern odd old olive open orange outer pale patient plain polite poor precious pretty prime
    private proper proud pure purple quaint queer quick quiet rapid rare raw ready red regal rich rigid ripe robust rosy
    rough round royal rude rugged rural rusty sad safe salty sandy scarlet secret serene severe shallow sharp shiny short
    shy silent silky silver simple single sleepy slender slim slow small smart smooth sober soft solar solemn solid sour
    southern spare special spicy square stable stale steady steep stern stiff still stout strange strict strong subtle
    sudden sunny super sweet swift tall tame tan tart tender tense thick thin thirsty tidy timid tiny tired total tough
    true upper urban vague vain vast velvet violet vivid warm wary weak wealthy western wet white whole wicked wide wild
    windy wise witty wooden worthy young zealous""".split()
)
NOUNS = tuple(
    """acorn actor almond anchor angle ankle anvil apple apron arch arena armor arrow atlas attic autumn axle badge bag
    baker ball bamboo banjo bank banner barn barrel basin basket beach beacon bead beak beam bean bear beaver bed bee
    beetle bell belt bench berry bird biscuit bishop blade blanket blossom board boat bolt bone bonnet book boot bottle
    bowl box branch brass bread brick bridge broom brush bucket buckle bull bush butter button cabin cable cactus cake
    calf camel camera camp canal candle cannon canoe canvas cape captain card carpet carrot cart castle cat cave cedar
    cellar chain chair chalk cherry chess chest chimney circle cliff clock cloud clover coach coat coin collar comb
    comet cook cord corn corner cotton couch cow crab cradle crane crater crayon creek cricket crow crown cube cup
    curtain cushion daisy dancer deer desert desk dial diamond dish ditch dock doctor dog doll dolphin donkey door dove
    dragon drawer dress drum duck eagle ear easel echo eel elbow elm engine fabric falcon farm feather fence fern ferry
    fiddle field fig finch finger fish flag flame flask flood floor flower flute fog forest fork fort fossil fountain
    fox frame frog fruit funnel garden garlic gate gazelle ghost giraffe glacier glass globe glove goat goose gorge
    grape grass gravel guitar gull hall hammer hammock handle harbor hare harp hat hawk heart hedge helmet hen herb
    heron hill hinge honey hood hook horn horse hotel house hut igloo inn iron island ivy jacket jar jelly jewel judge
    jug jungle kayak kettle key king kitchen kite kitten knee knife knight knot ladder lake lamb lamp lane lantern lark
    lawn leaf leather lemon lens letter lily lime linen lion lizard lobster lock log loom lunch lute magnet mango map
    maple market marsh mask mast meadow medal melon mill mirror mole monkey moon moose moss moth motor mountain mouse
    mule museum nail napkin needle nest net nickel night nurse oak oar oasis ocean onion opera orbit orchard organ otter
    oven owl ox oyster paddle page paint palace palm panda paper parcel park parrot patch path peach peacock pear pearl
    pebble pen pencil penguin pepper piano pigeon pillow pilot pine pipe pirate pitcher planet plank plate plow plum
    pocket poet pond pony poplar porch pot potato pottery prince prism puddle pump puppet puzzle quail quarry quartz
    queen quill quilt rabbit raft rail rain ranch raven reed reef ribbon rice ring river road robin robot rocket rod
    roof room root rope rose ruby rug sack saddle sail salad salmon salt sand sandal scale scarf school scout screw sea
    seal seed shadow shark sheep shelf shell shield ship shirt shoe shore shovel shrub silk singer sister skirt sky
    sled sleeve slipper smoke snail snake snow soap sock sofa soup spade spark sparrow spear sphere spider spike spoon
    spring spruce squirrel stable stage stair star statue steam steel stem stone stool storm stove straw stream street
    string summit sun swan sword table tailor teapot temple tent thorn thread throne thumb tiger tile timber toad toast
    tomato torch tower trail train tray tree trout trumpet trunk tulip tunnel turnip turtle valley vase vault veil vessel
    village vine violin wagon wall walnut walrus watch water wave weasel well whale wheat wheel whistle willow window
    wing winter wolf wood wool worm wren wrist yard yarn zebra zipper""".split()
)


def draw_key(rng: Random) -> str:
    """An adjective-noun pair; there are more than 150,000."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_keys(rng: Random, count: int) -> list[str]:
    """Different ones."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw_key(rng)] = None
    return list(keys)


def draw_value(rng: Random, kind: Kind) -> str:
    if kind == "word":
        return draw_key(rng)
    if kind == "number":
        return str(rng.randrange(1_000_000, 10_000_000))
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], digits[16:20], digits[20:]))


def draw_passkey(rng: Random) -> str:
    """5 digits."""
    return str(rng.randrange(10_000, 100_000))


def draw_variable(rng: Random, letters: int = 5) -> str:
    """Capitals."""
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def named_question(kind: Kind, keys: Sequence[str], values: int) -> tuple[str, str]:
    """Question and cue that ask for the values of these keys, `values` in all."""
    question, cue = (NAMED_QUESTION, NAMED_CUE) if values == 1 else (SEVERAL_QUESTION, SEVERAL_CUE)
    fields = {"kind": kind, "key": listed(keys)}
    return question.format(**fields), cue.format(**fields)


def prompt(intro: str, context: str, question: str, cue: str) -> str:
    """The whole prompt. An answer follows it after one space; leave `cue` empty to let the model begin by itself."""
    return f"{intro}\n\n{context}\n\nQuestion: {question}\nAnswer: {cue}".rstrip(" ")

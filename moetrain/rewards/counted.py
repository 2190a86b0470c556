"""What questions count: nouns that may stand behind a number and leave it what it is, and the
adjectives before them. Any other word has to stand on both sides.
"""

_NOUNS = frozenset(
    """
    apple orange banana pear peach plum cherry grape lemon lime mango melon watermelon berry
    strawberry blueberry raspberry pineapple coconut fruit vegetable carrot potato tomato onion
    pepper cucumber cabbage pumpkin bean nut almond peanut seed leaf petal flower rose tulip daisy
    lily sunflower plant tree bush branch acre log stick stone rock pebble shell brick tile block
    plank board nail screw bolt pipe rod wire rope ribbon string bead button thread
    egg cake cupcake cookie pie pastry bread loaf bun roll muffin donut doughnut bagel brownie
    pancake waffle sandwich burger hamburger hotdog pizza taco slice piece bite cracker chip candy
    chocolate lollipop jelly gum sweet treat snack cone popsicle scoop meal lunch dinner breakfast
    serving portion recipe batch dish plate bowl cup glass mug bottle can jar jug pitcher barrel
    bucket bag sack box carton crate case container package packet pack bundle basket tray drawer
    teaspoon tablespoon tsp tbsp spoonful spoon fork knife pint quart gallon cupful drop dose pill
    tablet vial
    person people man men woman women boy girl child children kid adult baby toddler teenager
    student pupil teacher classmate friend player member worker employee farmer nurse doctor
    patient
    customer client guest visitor passenger driver rider runner swimmer dancer singer soldier
    officer team group class club family brother sister sibling son daughter cousin parent nephew
    niece neighbor citizen resident voter vote applicant candidate participant spectator attendee
    fan friendship handshake couple pair trio
    dog cat puppy kitten rabbit bunny hamster mouse mice rat bird chicken hen rooster duck goose
    geese turkey pigeon parrot owl eagle cow calf bull ox oxen sheep lamb goat pig piglet
    horse pony
    donkey camel elephant lion tiger bear wolf fox deer monkey snake lizard frog toad turtle
    tortoise
    fish goldfish shark whale dolphin octopus crab lobster shrimp bee ant spider butterfly fly
    beetle bug insect worm snail animal pet creature egg nest feather leg foot feet arm hand finger
    toe eye ear tooth teeth head tail wing
    car truck bus van taxi bike bicycle motorcycle scooter train wagon carriage plane airplane jet
    boat ship ferry canoe vehicle wheel tire seat ticket trip ride flight lap race mile stop
    station
    road street lane bridge block
    book novel magazine newspaper comic page chapter paragraph sentence line word letter syllable
    character article essay report paper sheet notebook card postcard stamp sticker envelope
    photo photograph picture painting poster drawing song album movie film video episode show game
    puzzle toy doll ball marble balloon kite block lego token ticket crayon marker pencil pen
    eraser
    brush paintbrush ruler folder binder desk chair table bench sofa bed lamp candle bulb
    light clock
    watch phone computer laptop camera television battery cable machine robot tool hammer
    shirt blouse dress skirt sweater jacket coat hat cap scarf glove sock shoe boot sandal sneaker
    jean pant trouser tie belt uniform button bracelet necklace ring earring diamond gem jewel
    pearl
    coin penny pennies nickel dime bill banknote note buck shilling franc peso ruble rouble
    rand real
    baht dong lira dinar dirham zloty krona kroner shekel rupiah ringgit
    house home building room floor story stair step window door wall fence post pole tower tent
    garden field farm yard row column aisle shelf shelves rack stack pile bin locker
    school store shop office hospital hotel library museum theater park city town village country
    state island mountain river lake pool planet star moon
    task job chore problem question answer solution root exercise test exam quiz assignment lesson
    course project topic subject grade mark point score goal run win loss game match round set turn
    move hit shot throw jump pushup situp mistake error attempt try chance
    way method arrangement permutation combination outcome possibility option choice pattern
    sequence subset element term factor divisor multiple prime integer number digit value zero
    triangle square rectangle circle polygon pentagon hexagon octagon cube sphere face edge vertex
    vertices corner side angle diagonal segment chord line axis axes plane region cell grid path
    route node graph intersection
    item thing object product unit part component sample copy order gift present prize trophy medal
    award bonus coupon share stock bond loan message email call text post comment like follower
    subscriber view download file photo byte bit kilobyte megabyte gigabyte pixel
    second minute hour day night week weekend fortnight month year decade century centuries
    generation time session shift birthday holiday weekday
    atom molecule cell particle electron proton neutron ion gene base nucleotide
    calorie kilocalorie carat ton tonne decibel
    """.split()
) - {"square", "second", "base", "real", "prime", "zero", "time", "score", "multiple", "root"}
# A square is counted like a triangle, but "4 square" and "4 second" are cut units; the others
# say something else behind a number: 4 base, 4 prime, 4 times, 4 cube root.
_PLURALS = frozenset("squares roots multiples primes zeros zeroes scores".split())
_ADJECTIVES = frozenset(
    """
    red blue green yellow orange purple pink brown black white gray grey golden silver gold colored
    small little tiny big large huge long short tall wide thick thin round flat new old young fresh
    ripe rotten whole full empty different distinct unique possible total complete real prime
    odd even consecutive male female plastic wooden paper glass metal
    chocolate vanilla strawberry ice cream hot dog sweet soccer tennis basket base golf video board
    baseball trading playing post teddy school lego fiction science math english history
    """.split()
)
_ENDS = (("ies", "y"), ("ves", "f"), ("es", ""), ("s", ""))


def counted(text: str) -> str | None:
    """What is counted, in the singular: of "large red apples" it is the apple."""
    *before, last = text.casefold().replace("-", " ").split() or [""]
    name = _singular(last)
    if name is None or any(word not in _ADJECTIVES and _singular(word) != word for word in before):
        return None
    return name


def _singular(word: str) -> str | None:
    if word in _NOUNS:
        return word
    for end, new in _ENDS:
        if word.endswith(end) and (one := word.removesuffix(end) + new) in _NOUNS:
            return one
    return word.removesuffix("s") if word in _PLURALS else None

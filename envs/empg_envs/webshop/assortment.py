"""The words from which the generated shops' catalogs are made.

They were written for this package; no text comes from a real shop.
"""

from __future__ import annotations

import dataclasses

COLORS = (
    *("black", "white", "navy", "burgundy", "olive", "teal", "ivory", "charcoal", "lavender", "mustard"),
    *(
        "turquoise",
        "coral",
        "sage green",
        "dusty pink",
        "sky blue",
        "dark brown",
        "light grey",
        "deep purple",
    ),
)
BRANDS = (
    *("Aldvane", "Brimholt", "Corvale", "Dunmere", "Elsworth", "Fennick", "Gadwyn", "Halloway", "Ilvermoor"),
    *("Jorrick", "Kestelle", "Lorrimar", "Maplin & Roe", "Norvik", "Oakhurst", "Pellworth", "Quillon"),
    *("Rosenby", "Sandrel", "Tavimore", "Umberlin", "Varnholm", "Wexcombe", "Yarrowfield", "Zephyrine"),
)
# The reward compares values fuzzily ("small" matches "x-small"), so no two values of a list may be similar.
CLOTHES = ("xs", "s", "m", "l", "xl", "xxl")
SHOES = ("6", "7", "8", "9", "10", "11", "12")
BEDS = ("twin", "full", "queen", "king")
PACKS = ("single pack", "three pack", "six pack", "dozen")
VOLUMES = ("100 ml", "250 ml", "500 ml", "1 l")
LENGTHS = ("3 ft", "6 ft", "10 ft", "15 ft")
MEMORY = ("32 gb", "64 gb", "128 gb", "256 gb")
WIDTHS = ("24 inch", "36 inch", "58 inch", "71 inch")


@dataclasses.dataclass(frozen=True, slots=True)
class Department:
    """A department with the words for its goods.

    Attributes:
      name: the short category.
      path: first part of the category path.
      kinds: shelf -> its kinds of goods, singular.
      attributes: attributes of its goods.
      materials: materials, flavors or scents of its goods.
      uses: purposes of its goods.
      options: option name -> its possible values.
      prices: lowest and highest price in whole dollars.
    """

    name: str
    path: str
    kinds: dict[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    materials: tuple[str, ...]
    uses: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    prices: tuple[int, int]


DEPARTMENTS = (
    Department(
        "fashion",
        "Clothing",
        {
            "Tops": ("henley shirt", "crewneck sweater", "zip hoodie", "flannel blouse"),
            "Bottoms": ("cargo pants", "pleated skirt", "running shorts", "yoga leggings"),
            "Outerwear": ("rain jacket", "puffer vest"),
        },
        (
            *("machine wash", "hand wash", "slim fit", "loose fit", "long sleeve", "quick drying"),
            *("moisture wicking", "elastic waist", "wash cold", "tumble dry", "uv protection"),
        ),
        ("cotton", "merino wool", "linen blend", "recycled polyester", "bamboo viscose"),
        ("daily wear", "gym workout", "office work", "weekend travel", "cold weather"),
        {"color": COLORS, "size": CLOTHES},
        (12, 89),
    ),
    Department(
        "shoes",
        "Footwear",
        {
            "Sneakers": ("trail runner", "canvas sneaker", "court trainer"),
            "Boots": ("ankle boot", "hiking boot", "chelsea boot"),
            "Indoor": ("felt slipper", "pool sandal"),
        },
        (
            *("anti slip", "arch support", "memory foam", "steel toe", "water resistant", "rubber sole"),
            *("wide fit", "slip on", "shock absorbing", "removable insole"),
        ),
        ("suede", "full grain leather", "knit mesh", "vegan leather"),
        ("long walks", "wet weather", "indoor use", "standing all day"),
        {"color": COLORS, "size": SHOES},
        (18, 149),
    ),
    Department(
        "beauty",
        "Beauty & Care",
        {
            "Skin": ("face cleanser", "night cream", "body lotion", "clay mask"),
            "Hair": ("repair shampoo", "curl conditioner", "scalp serum"),
            "Bath": ("shower oil", "bath soak"),
        },
        (
            *("cruelty free", "paraben free", "fragrance free", "sensitive skin", "dry skin", "long lasting"),
            *("sulfate free", "travel size", "dermatologist tested", "alcohol free"),
        ),
        ("tea tree", "oat milk", "rose water", "green clay", "argan"),
        ("daily care", "dry winters", "after sun", "gifts"),
        {"scent": ("unscented", "lavender", "citrus", "sandalwood", "vanilla"), "volume": VOLUMES},
        (6, 58),
    ),
    Department(
        "grocery",
        "Pantry",
        {
            "Snacks": ("trail mix", "rice crackers", "granola bars", "roasted chickpeas"),
            "Drinks": ("loose leaf tea", "cold brew coffee", "fruit cordial"),
            "Baking": ("pancake mix", "oat flour"),
        },
        (
            *("gluten free", "non gmo", "low sugar", "dairy free", "plant based", "high protein"),
            *("keto friendly", "no artificial colors", "certified organic", "nut free"),
        ),
        ("almond", "cocoa", "ginger", "blueberry", "sesame"),
        ("school lunches", "long hikes", "breakfast", "late evenings"),
        {"flavor": ("original", "sea salt", "maple", "chili lime", "cinnamon"), "size": PACKS},
        (4, 42),
    ),
    Department(
        "electronics",
        "Electronics",
        {
            "Audio": ("bluetooth speaker", "over ear headphones", "clip on microphone"),
            "Cables": ("charging cable", "display cable"),
            "Storage": ("flash drive", "memory card"),
            "Gadgets": ("fitness watch", "reading lamp", "power bank"),
        },
        (
            *(
                "fast charging",
                "noise cancelling",
                "water proof",
                "hands free",
                "high speed",
                "plug and play",
            ),
            *("plug and play", "ultra light", "long battery life", "high resolution", "scratch resistant"),
        ),
        ("aluminum", "braided nylon", "soft silicone", "tempered glass"),
        ("home offices", "commuting", "camping", "video calls"),
        {"color": COLORS, "length": LENGTHS, "capacity": MEMORY},
        (9, 199),
    ),
    Department(
        "furniture",
        "Home & Living",
        {
            "Seating": ("lounge chair", "bar stool", "storage ottoman"),
            "Tables": ("console table", "coffee table", "standing desk"),
            "Storage": ("floating shelf", "shoe rack"),
        },
        (
            *("easy assemble", "space saving", "heavy duty", "mid century", "wall mounted", "easy clean"),
            *("height adjustable", "ready to use", "fully assembled", "non slip"),
        ),
        ("solid oak", "walnut veneer", "powder coated steel", "rattan", "tufted velvet"),
        ("small rooms", "living rooms", "dining corners", "entryways"),
        {"color": COLORS, "width": WIDTHS},
        (29, 480),
    ),
    Department(
        "bedding",
        "Bed & Bath",
        {
            "Bedding": ("duvet cover", "fitted sheet", "weighted blanket", "mattress pad"),
            "Windows": ("blackout curtain", "sheer drape"),
            "Towels": ("bath towel", "beach towel"),
        },
        (
            *("machine washable", "hypoallergenic", "breathable", "wrinkle resistant", "double sided"),
            *("super soft", "fade resistant", "deep pocket", "pet friendly", "lead free"),
        ),
        ("washed linen", "egyptian cotton", "brushed microfiber", "silk blend"),
        ("hot sleepers", "guest rooms", "nurseries", "dorm rooms"),
        {"color": COLORS, "size": BEDS},
        (14, 160),
    ),
    Department(
        "outdoor",
        "Garden & Outdoor",
        {
            "Garden": ("plant pot", "watering can", "herb planter"),
            "Camping": ("camp stove", "sleeping bag", "dome tent"),
            "Lighting": ("string lights", "solar lantern"),
        },
        (
            *("weather resistant", "rust proof", "easy carry", "eco friendly", "bpa free", "leak proof"),
            *("energy efficient", "foldable", "frost proof", "tool free"),
        ),
        ("terracotta", "galvanized steel", "ripstop nylon", "bamboo fiber"),
        ("balconies", "family trips", "patios", "festivals"),
        {"color": COLORS, "size": ("small", "medium", "large")},
        (8, 210),
    ),
)
PER_KIND = 16  # number of products of every kind

# Wordings of an instruction: {a} attributes, {k} kind, {m} material, {o} options, {p} price.
WORDINGS = (
    "Find me {a} {k} made of {m}{o}{p}",
    "i am looking for a {k} that is {a}, in {m}{o}{p}",
    "I need {a} {m} {k}{o}{p}",
    "please get me a {m} {k} which should be {a}{o}{p}",
    "can you find a {k} of {m}? it has to be {a}{o}{p}",
    "shopping for {m} {k}, {a}{o}{p}",
    "i would like to buy {k} with {m}, and i want it {a}{o}{p}",
    "my old {k} broke: find a {a} one of {m}{o}{p}",
)
OPTION_WORDINGS = ("{name}: {value}", "{value} as {name}", "the {name} {value}", "in {value} {name}")
PRICE_WORDINGS = (
    ", and price lower than {limit:.2f} dollars",
    ", for less than {limit:.0f} dollars",
    ", at most {limit:.0f} dollars",
    ". My budget is {limit:.0f} dollars",
)

# The tiny shop has few words and short pages.
TINY_KINDS = ("shirt", "dress", "hat", "bag", "lamp", "chair", "towel", "mug")
TINY_ATTRIBUTES = ("soft", "warm", "sturdy", "striped", "handmade", "woven", "plain")
TINY_COLORS = ("red", "blue", "black", "white", "yellow", "pink")
TINY_SIZES = ("small", "medium", "large")
TINY_PRICES = (15, 25, 35, 45)

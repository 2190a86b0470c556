"""What may stand behind or before a number: units, money, what is counted.

One name stands for all spellings of a unit. Units are not converted into each other: 1 m is not
100 cm here, as a question asks for one of them.
"""

import re

from moetrain.rewards.counted import counted

_CJK = r"\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_ASIAN = re.compile(rf"[{_CJK}]{{1,8}}")
_WORDS = re.compile(r"[a-z]{3,}(?:[- ][a-z]{2,}){0,3}")
_POWER = re.compile(r"(.+?)\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|(?<=[a-z])([23]))")
_OVER = re.compile(r"\\frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_INVERSE = re.compile(r"(.+?)(?:\s*\\cdot\s*|\s+)([^\s^]+?)\s*\^\s*\{?\s*-(\d)\s*\}?")
_PER = re.compile(r"\s*/\s*|\s+per\s+")

# spellings of one unit, the first its name
_SAME = """
$ usd dollar dollars us$ us-dollar us-dollars
€ eur euro euros
£ gbp pound-sterling pounds-sterling quid
¥ 円 yen jpy エン
元 yuan rmb cny 块 人民币
₹ inr rupee rupees rs ₨
₩ krw won 원
cent cents ¢
mm millimeter millimeters millimetre millimetres 毫米 ミリメートル ミリ
cm centimeter centimeters centimetre centimetres 厘米 公分 センチメートル センチ
dm decimeter decimeters decimetre decimetres
m meter meters metre metres 米 メートル
km kilometer kilometers kilometre kilometres kms 千米 公里 キロメートル
in inch inches
ft foot feet
yd yard yards
mi mile miles
g gram grams gramme grammes 克 グラム
kg kilogram kilograms kilo kilos kgs 千克 公斤 キログラム キロ
mg milligram milligrams 毫克 ミリグラム
lb lbs pound pounds
oz ounce ounces
l L liter liters litre litres 升 リットル
ml mL milliliter milliliters millilitre millilitres 毫升 ミリリットル
s sec secs second seconds 秒
min mins minute minutes 分 分钟 分間 分鐘
h hr hrs hour hours 小时 時間 小時
day days 日 天 日間
week weeks wk wks 週間 周 星期
month months か月 ヶ月 个月 個月 カ月
year years yr yrs 年 年間 岁-年
mph mi/h
km/h kmh kph kmph
m/s mps
deg degree degrees ° 度
℃ °C degC degrees-celsius degree-celsius celsius 摄氏度
℉ °F degF degrees-fahrenheit degree-fahrenheit fahrenheit
rad radian radians
hz Hz hertz
khz kHz kilohertz
N newton newtons
J joule joules
kj kJ kilojoules kilojoule
W watt watts
mW milliwatt milliwatts
MW megawatt megawatts
kw kW kilowatt kilowatts
kwh kWh
V volt volts
ohm ohms Ω \\Omega
µm μm \\mu-m micrometer micrometers micrometre micrometres micron microns
A amp amps ampere amperes
K kelvin kelvins
Pa pascal pascals
mol mole moles
unit units
個 个 箇 개 つ
人 名
匹 只
本 根
枚 张 張
"""
_NAMES: dict[str, str] = {}
for _line in _SAME.split("\n"):
    _spellings = [word.replace("-", " ") for word in _line.split()]
    _NAMES.update(dict.fromkeys(_spellings, _spellings[0] if _spellings else ""))

MONEY = re.compile(  # before a number
    r"(?:US)?\$|[€£¥₹₩]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|Rs\.?|₨|quid)\s*(?=[-+\d.])"
)
UNSURE = "?"  # before a word that no table has: it has to stand on both sides
SINGLE = frozenset("m g s l L h N J W V A K".split())  # letters that a variable could be, too

# Words that say something else than what is counted.
_NO_UNITS = frozenset(
    """is are was were be not no or and to than then of plus minus times divided over more less most
    least at exactly approximately about around if mod modulo log ln exp sqrt sin cos tan cot sec
    csc arcsin arccos arctan sinh cosh tanh max min gcd lcm det lim sum prod pi infinity inf inv div
    choose dozen hundred thousand million billion trillion half halves third thirds fourth fourths
    quarter quarters fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth
    hundredths percent out from with without the for when where but only never wrong right true
    false between either neither nor except unless greater smaller larger equal equals""".split()
)
_NO_ASIAN = re.compile(
    r"以上|以下|以内|未満|未满|超|より|大于|小于|至少|最多|または|或|と|和|か$|ではな|ではあ|不是|じゃな|じゃあ|아니|約|余|倍"
    r"|乗|乘|階|阶|^平方$|^立方$|次方|根|割|成$|折|打$|逆|進|进制|半|弱|強|多$|几|数|分の|分之|百分点|제곱|배"
)
_ENDING = re.compile(r"(?:です|である|だ|になる|になります|となる|となります|でした|입니다|이다)$")


def without_ending(text: str) -> str:
    """Without the verb that ends a Japanese or Korean sentence."""
    return _ENDING.sub("", text).strip(" .")


def unit_of(text: str, apart: bool) -> str | None:
    """The name of the unit that is all of `text`; None where it is none. A unit that a variable
    could be called, and one that no table has, have to stand `apart` from their number.
    """
    text = without_ending(" ".join(text.split()))
    if not text:
        return None
    known = _known(text)
    if known is not None:
        return known if apart or text not in SINGLE else None
    if _ASIAN.fullmatch(text):
        return None if _NO_ASIAN.search(text) else text
    text = text.casefold() if len(text) > 2 else text
    words = re.split(r"[- ]", text)
    if apart and _WORDS.fullmatch(text) and not _NO_UNITS & set(words):
        # Any other word may say how the number is meant: 4 inverse, 4 too many.
        return counted(text) or f"{UNSURE}{text.removesuffix('s')}"
    return None


def _known(text: str) -> str | None:
    """Of the tables, with powers, products and fractions of such."""
    if text in _NAMES:
        return _NAMES[text]
    if len(text) > 2 and text.casefold() in _NAMES:
        return _NAMES[text.casefold()]
    if over := _OVER.fullmatch(text):
        is_short = len(over[1].strip()) == len(over[2].strip()) == 1
        name = _joined(_known(over[1].strip()), "/", _known(over[2].strip()))
        return None if is_short and name not in _NAMES.values() else name
    parts = _PER.split(text)
    if len(parts) == 2:
        above = _known(parts[0]) or counted(parts[0])
        return _joined(above, "/", _known(parts[1]))
    if match := _INVERSE.fullmatch(text):
        below = _known(match[2])
        power = int(match[3])
        below = below if power == 1 or below is None else _raised(match[2], power)
        return _joined(_known(match[1]), "/", below)
    if len(factors := re.split(r"\s*\\cdot\s*", text)) == 2:
        return _joined(_known(factors[0]), "*", _known(factors[1]))
    for word, power in (("square ", 2), ("sq ", 2), ("sq. ", 2), ("cubic ", 3), ("平方", 2),
                        ("立方", 3), ("cu ", 3)):  # fmt: skip
        if text.startswith(word):
            return _raised(text[len(word) :], power)
    for word, power in ((" squared", 2), (" cubed", 3)):
        if text.endswith(word):
            return _raised(text[: -len(word)], power)
    match = _POWER.fullmatch(text)
    if match:
        return _raised(match[1], int(match[2] or match[3]))
    return None


def _joined(one: str | None, how: str, other: str | None) -> str | None:
    if one is None or other is None:
        return None
    return _NAMES.get(f"{one}{how}{other}", f"{one}{how}{other}")


def _raised(text: str, power: int) -> str | None:
    base = _known(text.strip())
    return None if base is None or "^" in base else f"{base}^{power}"

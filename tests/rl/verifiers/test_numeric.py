"""Numbers and quantities as models write them: (answer text, expected answer, verdict)."""

import pytest

from kimivl.rl.verifiers import Numeric
from kimivl.rl.verifiers.numbers import only_number
from kimivl.rl.verifiers.units import parse_unit

RIGHT = [
    ("12", "12"),
    ("12.", "12"),
    ("12.0", "12"),
    ("+12", "12"),
    ("$12$", "12"),
    (r"\(12\)", "12"),
    (r"\boxed{12}", "12"),
    (r"The answer is \boxed{12} apples", "12"),
    (r"\boxed{1} no wait \boxed{12}", "12"),
    ("**12**", "12"),
    ("x = 12", "12"),
    (r"\boxed{x = 12}", "12"),
    ("There are 12 apples.", "12"),
    ("twelve", "12"),
    ("1,234", "1234"),
    ("1,234,567.5", "1234567.5"),
    (r"1{,}234", "1234"),
    ("1 234 567", "1234567"),
    (r"12\,345", "12345"),
    ("1234", "1,234"),
    ("\u22125", "-5"),
    ("\u20135", "-5"),
    ("-5", "\u22125"),
    ("0.5", "1/2"),
    (".5", "0.5"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{1}{2}", "1/2"),
    (r"\frac12", "0.5"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"2\frac{1}{2}", "2.5"),
    ("2 1/2", "2.5"),
    ("2\u00bd", "2.5"),
    ("\u00be", "0.75"),
    ("6.02e23", r"6.02 \times 10^{23}"),
    (r"6.02 \times 10^{23}", "6.02e23"),
    ("6.02 x 10^23", "6.02e23"),
    ("6.02\u00d710\u00b2\u00b3", "6.02e23"),
    ("10^{-3}", "0.001"),
    ("3.1416", "3.14159"),
    ("0.33333", "1/3"),
    ("50%", "50"),
    (r"50\%", "50%"),
    ("0.5", "50%"),
    ("50%", "0.5"),
    ("50 percent", "50%"),
    ("$5", "5"),
    (r"\$5.00", "$5"),
    (r"$\$5.00$", "5"),
    ("-$5", "-5"),
    ("5 dollars", "$5"),
    ("\u20ac7.50", "7.5"),
    ("60\u00b0", "60"),
    (r"60^\circ", r"60^{\circ}"),
    ("60 degrees", "60\u00b0"),
    ("25 \u00b0C", "25"),
    (r"25^\circ\text{C}", "25 degrees Celsius"),
    ("5 cm", "5"),
    ("5", "5 cm"),
    (r"5\text{ cm}", "5 cm"),
    (r"5~\mathrm{cm}", "5 cm"),
    ("0.05 m", "5 cm"),
    ("5 centimeters", "5cm"),
    ("2 m", "200 cm"),
    ("1.5 hours", "90 minutes"),
    ("90 km/h", "25 m/s"),
    (r"9.8\ \mathrm{m/s^2}", "9.8 m/s^2"),
    ("12 cm^2", "12 square centimeters"),
    ("12 cm\u00b2", "12 cm^2"),
    ("1 L", "1000 cm^3"),
    ("12 apples", "12 apples"),
    ("12 students", "12"),
    ("The length is 5 cm.", "5 cm"),
    (r"\approx 3.14159", "3.14159"),
    ("The answer is 12. I hope that helps!", "12"),
    ("#### 12", "12"),
]
WRONG = [
    ("13", "12"),
    ("", "12"),
    ("   ", "12"),
    ("I cannot answer that.", "12"),
    ("I'm sorry, but I can't help with that.", "12"),
    ("between 11 and 12", "12"),
    ("11 or 12", "12"),
    (r"\boxed{12} no, \boxed{13}", "12"),
    (r"\boxed{}", "12"),
    (r"12 \boxed{", "-12"),
    ("-12", "12"),
    ("1.2", "12"),
    ("2021", "2022"),  # near, but a whole number
    ("12x", "12"),
    ("12(x+1)", "12"),
    ("12 + 1", "12"),
    ("5 kg", "5 cm"),
    ("5 m", "5 cm"),
    ("5 cm^2", "5 cm"),
    ("1,23", "123"),
    ("1,2", "12"),
    ("9**9**9", "12"),
    ("1e999999999", "12"),
    ("9" * 3000, "12"),
    ("10^{10^{10}}", "12"),
    ("1/0", "12"),
    ("nan", "12"),
    ("inf", "12"),
    ("\u221e", "12"),
    ("5", "0.05"),
    ("0.334", "1/3"),
    ("12 12 12 13", "12"),
    (r"\boxed{12,13,14}", "12"),
    ("It is 12,13 or so.", "12"),
    ("NaN 12e", "13"),
    (r"\frac{12}{0}", "12"),
]


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_right(text, expected):
    assert Numeric()(text, expected) is True


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong(text, expected):
    assert Numeric()(text, expected) is False


def test_tolerance():
    assert Numeric(relative=0.05)("104", "100.0")
    assert not Numeric(relative=0.05)("106", "100.0")
    assert not Numeric(relative=0.05)("104", "100"), "a whole number must be met"
    assert Numeric(relative=0.05, exact_integers=False)("104", "100")
    assert Numeric(relative=0, absolute=0.5)("2.9", "2.5")
    assert not Numeric(relative=0, absolute=0.5)("3.1", "2.5")


@pytest.mark.parametrize(
    ("units", "text", "right"),
    [
        ("ignore", "5 kg", True),
        ("match", "5 kg", False),
        ("match", "5", True),
        ("require", "5", False),
        ("require", "50 mm", True),
    ],
)
def test_units(units, text, right):
    assert Numeric(units=units)(text, "5 cm") is right


def test_an_expected_answer_that_is_no_number_is_an_error_and_no_wrong_answer():
    with pytest.raises(ValueError, match="'blue' is not a number"):
        Numeric()("5", "blue")
    with pytest.raises(ValueError, match="relative >= 0"):
        Numeric(relative=-1)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("cm", (0.01, (("length", 1),))),
        ("km/h", (1000 / 3600, (("length", 1), ("time", -1)))),
        ("square meters", (1.0, (("length", 2),))),
        ("m s^{-1}", (1.0, (("length", 1), ("time", -1)))),
        ("mL", (1e-6, (("length", 3),))),
        ("%", (0.01, ())),
        ("inches", (0.0254, (("length", 1),))),
        ("apples", None),
        ("x", None),
        ("", None),
    ],
)
def test_units_are_read(text, unit):
    assert parse_unit(text) == (unit and (pytest.approx(unit[0]), unit[1]))


def test_the_only_number_of_a_sentence():
    assert only_number("There are 3 cats in 2 rooms.") is None
    assert only_number("The room holds 3 cats").value == 3
    assert only_number("about 50% of them").unit == "%"
    assert only_number("none") is None

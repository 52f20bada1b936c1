r"""The kinds of answers: rows of (question, answer) as such problems have them."""

import pytest

from kimivl.assess.kinds import answer_kind

ASK = "What is the value?"
OPTIONS = "What is the capital of France?\nA. London\nB. Paris\nC. Rome"
INLINE = "Which is the largest? (A) 12 (B) 15 (C) 9 (D) none of these"

NUMBERS = ["6", "-3", "+7", "0", "007", "1,234,567", "3.14", ".5", "-0.25", "1e-3", "6.02E23", "3/4", "-3/4", "1 3/4"]
NUMBERS += ["50%", "50 %", r"50\%", "30°", r"30^\circ", r"90^{\circ}", "$5", "$1,200.50", "€3", "12 cm", "12cm"]
NUMBERS += ["5 km/h", "9.8 m/s^2", "16 square meters", "12 apples", r"\frac{3}{4}", r"-\frac{1}{2}", r"\dfrac{22}{7}"]
NUMBERS += [r"\frac34", "$42$", r"\(42\)", r"\boxed{42}", "42.", r"3 \times 10^{8}", "3 x 10^5", r"12 \text{ cm}"]
NUMBERS += [r"$\boxed{\frac{1}{3}}$", "−4", "2 L", "100 kg", "1\\,000", "8 m²"]  # noqa: RUF001

EXPRESSIONS = ["x^2 + 1", "2x", "2x+3", r"\sqrt{2}", r"2\pi", "2π", "(1, 2)", "[0, 1)", "{1, 2, 3}", "x = 3", "y=2x+1"]
EXPRESSIONS += ["1, 2, 3", "a+b", r"\frac{x}{y}", r"\frac{\sqrt{3}}{2}", "sin(x)", "3:4", "x", "n!", "∞", "x > 5", "√2"]
EXPRESSIONS += ["(-∞, 3]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "5 - 2i", "$x \\in [0, 1]$", "a_1", "2^10"]

TEXTS = ["Paris", "the blue car", "red and green", "3 dogs and 2 cats", "George Washington", "north-west", "STOP"]
TEXTS += ["a rose", "Paris, France", "it depends", "巴黎", "U.S.A. (1776)", r"\text{Paris}"]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (answer, kind)
        for kind, group in (("number", NUMBERS), ("expression", EXPRESSIONS), ("text", TEXTS))
        for answer in group
    ],
)
def test_the_form_of_the_answer(answer, kind):
    assert answer_kind(ASK, answer) == kind


CHOICES = [(OPTIONS, answer) for answer in ("B", "(B)", "B.", "b)", "(b)", "B. Paris", "B) Paris", "Paris", "paris")]
CHOICES += [(INLINE, answer) for answer in ("B", "15", "none of these", "(C)", "A, C", "A and B")]
CHOICES += [
    ("Which of the following is a prime? See the picture.", "C"),
    ("Select the correct letter in the image.", "D"),
    ("What colour is it? Choose from: red, green, blue.", "green"),
    ("Options: cat, dog or bird. What is shown?", "dog or bird"),
    ("下列哪个是质数？(A) 4 (B) 5", "B"),  # noqa: RUF001
    ("Pick one. A: yes B: no", "A"),
    ("Is the sky blue?\n(a) yes\n(b) no", "yes"),
]
CHOICES.remove(("Options: cat, dog or bird. What is shown?", "dog or bird"))


@pytest.mark.parametrize(("question", "answer"), CHOICES)
def test_an_option_of_the_question(question, answer):
    assert answer_kind(question, answer) == "choice"


@pytest.mark.parametrize(
    ("question", "answer"),
    [(ASK, answer) for answer in ("True", "false", "Yes", "no.", "YES", "Correct", "是", "错误", r"\text{True}")]
    + [("True or false: 7 is prime.", "T"), ("Answer T/F.", "F"), ("Answer yes or no.", "Y")],
)
def test_true_or_false(question, answer):
    assert answer_kind(question, answer) == "true_false"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Prove that the square root of 2 is irrational.", "see solution"),
        ("Let n be odd. Show that n^2 - 1 is divisible by 8.", "Q.E.D."),
        ("Please prove the claim.", "By induction."),
        ("Define f. Then prove it is continuous.", "omitted"),
        ("证明: 根号2是无理数", "略"),
        ("(1) Find x. (2) Show that x > 0.", "x > 0"),
    ],
)
def test_proofs(question, answer):
    assert answer_kind(question, answer) == "proof"


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Show your work. How many are there?", "12", "number"),
        ("The show that runs on Monday is watched by whom?", "students", "text"),
        ("Show that x solves it, and give x.", "4", "number"),  # what can be checked is a number
        ("A proof press makes how many prints?", "300", "number"),
        ("Which letter is painted on the door?", "B", "expression"),  # no options: a variable or a letter
        ("Read the sign. A. Smith lives here. Who?", "Smith", "text"),  # one initial is no list of options
        ("What is 2+2?", "4", "number"),
        ("Find a) the area and c) the side.", "12", "number"),
        ("Is it (A) or (B)?", "17", "number"),
        ("", "5", "number"),
        ("", "", "text"),
    ],
)
def test_what_only_looks_like_another_kind(question, answer, kind):
    assert answer_kind(question, answer) == kind

"""Multiple-choice answers: (answer text, expected letter, verdict)."""

import pytest

from kimivl.rl.verifiers import Choice

RIGHT = [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("B)", "B"),
    ("**B**", "B"),
    ("**B.** Paris", "B"),
    ("B. Paris", "B"),
    ("B: Paris", "B"),
    ("B) Paris", "B"),
    ("(B) Paris", "B"),
    ("Option B", "B"),
    ("option (B)", "B"),
    ("Choice B.", "B"),
    ("Answer: B", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B) Paris.", "B"),
    ("The correct answer is **B**.", "B"),
    ("the correct option is B", "B"),
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{B}}", "B"),
    (r"\boxed{\textbf{(B)}}", "B"),
    (r"\boxed{\text{B. Paris}}", "B"),
    (r"\boxed{\mathrm{B}}", "B"),
    (r"A is wrong, so \boxed{B}", "B"),
    ("$B$", "B"),
    ("B - Paris", "B"),
    ("A", "A"),
    ("A.", "(A)"),
    ("A", "A. Rome"),
    ("Looking at the picture, I choose option B because it is red.", "B"),
    ("It must be (B), since the sky is blue.", "B"),
    ("(B), a dog", "B"),
    ("(B) and I am sure", "B"),
    ("(B), A dog", "B"),
    ("A, C", "A, C"),
    ("C and A", "A, C"),
    ("AC", "A, C"),
    (r"\boxed{A, C}", "AC"),
]
WRONG = [
    ("A", "B"),
    ("", "B"),
    ("Paris", "B"),
    ("A cat is shown in the picture.", "A"),
    ("A. B. C. D.", "B"),
    ("A, B, C, D", "B"),
    ("(A) (B) (C) (D)", "B"),
    ("It is either (A) or (B).", "B"),
    ("The answer is A or B.", "B"),
    (r"\boxed{A} \boxed{B} \boxed{C}", "B"),
    (r"\boxed{A, B, C, D}", "B"),
    ("Because of B12 deficiency", "B"),
    ("I cannot see the image.", "B"),
    ("I", "B"),
    ("None of the above", "B"),
    ("A", "A, C"),
    ("A, B, C", "A, C"),
    ("BB", "B"),
    ("Be careful", "B"),
    (r"\boxed{\text{B) or C)}}", "B"),
    (r"\boxed{\text{B) or C) or D)}}", "B, C"),
    ("(B), (C)", "B"),
    ("B. / C.", "B"),
]


@pytest.mark.parametrize(("text", "expected"), RIGHT)
def test_right(text, expected):
    assert Choice()(text, expected) is True


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_wrong(text, expected):
    assert Choice()(text, expected) is False


def test_letters():
    assert not Choice(letters="AB")("C", "B")
    with pytest.raises(ValueError, match="names none of AB"):
        Choice(letters="AB")("C", "C")
    with pytest.raises(ValueError, match="capital letters"):
        Choice(letters="a-d")

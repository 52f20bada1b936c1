"""Mathematical answers: (answer text, expected answer, verdict)."""

import pytest

from kimivl.rl.verifiers import Mathematics
from kimivl.rl.verifiers.mathematics import is_huge

SETTLED = [
    # (text, expected, verdict): no computer algebra
    (r"\boxed{5}", "5", True),
    (r"\boxed{5}", "6", False),
    ("The answer is $5$.", "5", True),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{\frac12}", "0.5", True),
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
    (r"\boxed{0.333333}", r"\frac{1}{3}", True),
    (r"\boxed{0.333}", r"\frac{1}{3}", False),
    (r"\boxed{0.000333}", r"\frac{1}{3000}", True),
    (r"\boxed{0}", r"6.67 \times 10^{-11}", False),  # equal to six decimals
    (r"\boxed{0.0}", "1e-7", False),
    (r"\boxed{6.67e-11}", r"6.67 \times 10^{-11}", True),
    (r"\boxed{3 + 4}", "7", False),  # the question said again
    (r"\boxed{12 \cdot 34}", "408", False),
    (r"\boxed{3+4=3+4}", "7", False),
    (r"\boxed{(1+2)*3}", "9", False),
    (r"\boxed{3 + 4}", "3+4", True),
    ("x" * 2_000, "5", False),
    (r"\boxed{1,000}", "1000", True),
    (r"\boxed{1\,000}", "1000", True),
    (r"\boxed{50\%}", "50", True),
    (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{60^\circ}", "60", True),
    (r"\boxed{\$12}", "12", True),
    (r"\boxed{x^2+1}", "x^2 + 1", True),
    (r"\boxed{\left(1, 2\right)}", "(1,2)", True),
    (r"\boxed{\text{yes}}", "yes", True),
    (r"\boxed{}", "5", False),
    ("", "5", False),
    (r"9**9**9", "5", False),
    (r"\boxed{9^{9^9}}", "5", False),
    (r"\boxed{10^{100000}}", "5", False),
    (r"\boxed{99999!}", "5", False),
    ("{" * 100 + "5" + "}" * 100, "5", False),
    (r"\sqrt{" * 60 + "2" + "}" * 60, r"\sqrt{2}", False),
    (r"\frac{1}{" * 40 + "2" + "}" * 40, "x+1", False),
    ("1+" * 2000 + "1", "2001", False),
    ("I'm sorry, I cannot solve this problem. " * 40, "5", False),
]
ALGEBRA = [
    (r"\boxed{x(x+1)}", "x^2+x", True),
    (r"\boxed{x(x+1)}", "x^2-x", False),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True),
    (r"\boxed{sqrt(8)}", r"2\sqrt{2}", True),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", True),
    (r"\boxed{\sqrt{3}}", r"\sqrt{2}", False),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
    (r"\boxed{\{1, 2, 3\}}", r"\{1, 2\}", False),
    (r"\boxed{[0, 1)}", "[0,1)", True),
    (r"\boxed{(0, 1]}", "[0, 1]", False),
    (r"\boxed{(1, \frac{4}{2})}", "(1, 2)", True),
    (r"\boxed{(2, 1)}", "(1, 2)", False),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&\frac{8}{2}\end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    (r"\boxed{\frac{\pi}{2}}", r"\frac{1}{2}\pi", True),
    (r"\boxed{pi/2}", r"\frac{\pi}{2}", True),
    ("\\boxed{\u03c0/2}", r"\frac{\pi}{2}", True),
    ("\\boxed{\u221a(8)}", r"2\sqrt{2}", True),
    (r"\boxed{2*x**2}", "2x^2", True),
    (r"\boxed{x = 5}", "5", True),
    (r"\boxed{x \le 5}", r"x \leq 5", True),
    (r"\boxed{x < 5}", "x > 5", False),
    (r"\boxed{(-\infty, 2) \cup (3, \infty)}", r"(-\infty,2)\cup(3,\infty)", True),
    (r"\boxed{3 + 4i}", "4i+3", True),
    (r"\boxed{\log_2 8}", "3", True),
    (r"\boxed{2^{10}}", "1024", True),
    (r"\boxed{3+4=7}", "7", True),
    (r"\boxed{(\frac{3}{4})}", "0.75", True),
    (r"\boxed{5\text{ cm}}", "5", True),
    (r"\boxed{a}", "b", False),
    (r"\boxed{5x}", "5", False),
    (r"\boxed{\text{no}}", "yes", False),
    (r"\boxed{1, 2, 3, 4, 5, 6, 7, 8}", "5", False),
    ("Any of 1, 2, 3 or 5 would do", "7", False),
    (r"\boxed{\frac{1}{0}}", "5", False),
    (r"\boxed{\frac{1}{2}", "5", False),
    (r"\boxed{}}{}{", "5", False),
    (r"\boxed{\undefined{3}}", "5", False),
]


@pytest.mark.parametrize(("text", "expected", "right"), SETTLED)
def test_settled_without_algebra(text, expected, right):
    assert Mathematics().settle(text, expected) is right


@pytest.mark.parametrize(("text", "expected", "right"), ALGEBRA)
def test_algebra(text, expected, right):
    assert Mathematics()(text, expected) is right


def test_what_is_settled_is_never_in_doubt():
    for text, expected, right in ALGEBRA:
        assert Mathematics().settle(text, expected) in (None, right), (text, expected)


def test_an_expected_answer_that_is_huge_itself_is_worked_out():
    assert is_huge("10^{100000}")
    assert Mathematics().settle(r"\boxed{10^{100000}}", "10^{100000}") is True
    assert Mathematics().settle(r"\boxed{10^{100001}}", "10^{100000}") is None

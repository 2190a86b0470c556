"""Problems in the columns of open-r1's Codeforces data, and answers to them, for
open_r1_fixtures.py: 50 answers, some right, in two languages.
"""


def case(given: str, wanted: str) -> dict[str, str]:
    return {"input": given, "output": wanted}


# Many right outputs: two numbers of a given sum, both positive. A checker decides.
CHECKER = """import sys

def main():
    given, right, own = (open(path).read() for path in sys.argv[1:4])
    try:
        a, b = map(int, own.split())
    except ValueError:
        return 0
    return int(a > 0 and b > 0 and a + b == int(given))

print(main())
"""
# One that speaks of 100 points, and raises on what it does not expect.
CHECKER_OF_POINTS = """import sys
wanted = float(open(sys.argv[2]).read())
own = float(open(sys.argv[3]).read())
print(100 if abs(own - wanted) < 1e-4 else 0)
"""

PROBLEMS = {
    "sum": {
        "id": "1/A", "time_limit": 15.0, "memory_limit": 256.0, "input_mode": "stdio",
        "generated_checker": None,
        "official_tests": [case("1 2\r\n", "3\r\n"), case("10 -4\n", "6\n"), case("0 0\n", "0\n")],
        "more": [case("1000000000000 1\n", "1000000000001\n")],
    },
    "split": {
        "id": "2/B", "time_limit": 15.0, "memory_limit": 256.0, "input_mode": "stdio",
        "generated_checker": CHECKER,
        "official_tests": [case("5\n", "1 4\n"), case("2\n", "1 1\n"), case("100\n", "1 99\n")],
        "more": [],
    },
    "root": {
        "id": "3/C", "time_limit": 15.0, "memory_limit": 256.0, "input_mode": "stdio",
        "generated_checker": CHECKER_OF_POINTS,
        "official_tests": [case("2\n", "1.41421356\n"), case("9\n", "3\n")],
        "more": [],
    },
    "file": {
        "id": "4/D", "time_limit": 15.0, "memory_limit": 256.0, "input_mode": "file",
        "generated_checker": None,
        "official_tests": [case("3\n1 2 3\n", "6\n"), case("1\n5\n", "5\n")],
        "more": [],
    },
    "even": {
        "id": "5/E", "time_limit": 15.0, "memory_limit": 128.0, "input_mode": "stdio",
        "generated_checker": None,
        "official_tests": [case("2\n4 7\n", "YES\nNO\n"), case("1\n1\n", "NO\n")],
        "more": [case("3\n2 3 4\n", "YES\n\nNO\nYES\n")],
    },
    "slow": {
        "id": "7/G", "time_limit": 1.0, "memory_limit": 256.0, "input_mode": "stdio",
        "generated_checker": None, "official_tests": [case("1 2\n", "3\n")], "more": [],
    },
    "none": {
        "id": "6/F", "time_limit": 15.0, "memory_limit": 256.0, "input_mode": "stdio",
        "generated_checker": None, "official_tests": [], "more": [],
    },
}  # fmt: skip


def python(source: str) -> str:
    return f"So:\n```python\n{source}\n```\nThat is it."


def cpp(source: str) -> str:
    return f"```cpp\n#include <cstdio>\n#include <vector>\n{source}\n```"


_SUM = "a, b = map(int, input().split())\n"
_READ = "print(sum(map(int, open('input.txt').read().split()[1:]))"
_EVEN = "input()\nfor n in map(int, input().split()):\n    "
SUBMISSIONS = [
    # numbers that are added
    ("sum", "python", python(_SUM + "print(a + b)")),
    ("sum", "python", python(_SUM + "print(a + b, end='')")),
    ("sum", "python", python(_SUM + "print(' ', a + b, ' \\n\\n')")),
    ("sum", "python", python(_SUM + "print(a - b)")),
    ("sum", "python", python(_SUM + "print(abs(a) + abs(b))")),
    ("sum", "python", python(_SUM + "print((a + b) % 1000000007)")),
    ("sum", "python", python(_SUM + "print(f'{a + b}.0')")),
    ("sum", "python", python("print(3)")),
    ("sum", "python", python("print('3 ')\nraise SystemExit(1)")),
    ("sum", "python", python("this is no Python")),
    ("sum", "python", python("import sys\nprint(sum(map(int, sys.stdin.read().split())))")),
    ("sum", "python", python("x = bytearray(2 << 30)\nprint(3)")),
    ("sum", "python", "I do not know."),
    ("sum", "python", "```python\nprint(3)"),
    ("sum", "python", "```\nprint(3)\n```"),
    ("sum", "python", python("print(0)") + "\nNo:\n" + python(_SUM + "print(a + b)")),
    ("sum", "cpp", cpp('int main() { long long a, b; scanf("%lld %lld", &a, &b);'
                       ' printf("%lld", a + b); }')),
    ("sum", "cpp", cpp('int main() { int a, b; scanf("%d %d", &a, &b); printf("%d", a + b); }')),
    ("sum", "cpp", cpp("int main() { return ")),
    ("sum", "cpp", cpp("int main() { undeclared(); }")),
    ("sum", "cpp", "No program."),
    # one of many
    ("split", "python", python("n = int(input())\nprint(1, n - 1)")),
    ("split", "python", python("n = int(input())\nprint(n - 1, 1)")),
    ("split", "python", python("n = int(input())\nprint(n // 2)\nprint(n - n // 2)")),
    ("split", "python", python("n = int(input())\nprint(0, n)")),
    ("split", "python", python("n = int(input())\nprint(2, n - 2)")),
    ("split", "python", python("print('1 4')")),
    ("split", "python", python("print('one and four')")),
    ("split", "python", python("pass")),
    ("split", "cpp", cpp('int main() { int n; scanf("%d", &n); printf("%d %d", n - 1, 1); }')),
    ("root", "python", python("print(float(input()) ** 0.5)")),
    ("root", "python", python("print(round(float(input()) ** 0.5, 5))")),
    ("root", "python", python("print(round(float(input()) ** 0.5, 2))")),
    ("root", "python", python("print('about 1.41421')")),
    ("root", "python", python("print(1)")),
    # files
    ("file", "python", python(_READ + ", file=open('output.txt', 'w'))")),
    ("file", "python", python(_READ + ")")),
    ("file", "python", python("print(6, file=open('output.txt', 'w'))")),
    ("file", "python", python("import sys\nsys.stdin = open('input.txt')\n"
                              "sys.stdout = open('output.txt', 'w')\ninput()\n"
                              "print(sum(map(int, input().split())))")),
    ("file", "cpp", cpp('int main() { freopen("input.txt", "r", stdin);'
                        ' freopen("output.txt", "w", stdout); int n, x, s = 0; scanf("%d", &n);'
                        ' while (n--) { scanf("%d", &x); s += x; } printf("%d", s); }')),
    # words in any case, however broken into lines
    ("even", "python", python(_EVEN + "print('NO' if n % 2 else 'YES')")),
    ("even", "python", python(_EVEN + "print('no' if n % 2 else 'Yes')")),
    ("even", "python", python(_EVEN + "print('NO' if n % 2 else 'YES', end=' ')")),
    ("even", "python", python(_EVEN + "print('YES' if n % 2 else 'NO')")),
    ("even", "python", python(_EVEN + "print('NO')")),
    ("even", "python", python(_EVEN + "print('N O' if n % 2 else 'YES')")),
    ("slow", "python", python("while True: pass")),
    ("slow", "python", python("import time\nprint(3, flush=True)\ntime.sleep(20)")),
    # nothing to grade by
    ("none", "python", python("print(1)")),
    ("none", "python", "nothing"),
]  # fmt: skip

CASES = {
    "square": [case("3", "9"), case("-2", "4"), case("0", "0"), case("12", "144")],
    "lines": [case("2\nab cd\nef\n", "AB CD\nEF\n"), case("1\nx\n", "X\n")],
}
CODE = [
    ("square", python("print(int(input()) ** 2)")),
    ("square", python("n = int(input())\nprint(n * n if n > 0 else -n * n)")),
    ("square", python("print(9)")),
    ("square", python("print(input() * 2)")),
    ("square", python("1 / 0")),
    ("square", python("n = int(input())\nprint(n * n)\nassert n > 0")),
    ("square", "Nothing."),
    ("square", python("print(0)") + python("print(int(input()) ** 2)")),
    ("lines", python("for _ in range(int(input())):\n    print(input().upper())")),
    ("lines", python("for _ in range(int(input())):\n    print(input().upper(), ' ')")),
    ("lines", python("for _ in range(int(input())):\n    print(input())")),
    ("lines", python("n = int(input())\nprint('X' if n == 1 else 'AB CD\\nEF')")),
]

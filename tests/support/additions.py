"""Pairs of responses that need no file: sums of two numbers. Depends on nothing, so that any framework can use them."""


def additions(n: int) -> list[dict[str, str]]:
    """Return n prompts, each with a right and a wrong response. The responses differ in length."""
    terms = [(i * 37 % 100, i * 73 % 1000) for i in range(n)]
    return [
        {"prompt": f"{a} + {b} = ", "chosen": f"{a + b}", "rejected": f"{a + b + 1}{' or so' * (a % 3)}"}
        for a, b in terms
    ]

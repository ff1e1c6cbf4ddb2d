"""Accounts in whole cents: parsing, posting, splitting, statements."""


class LedgerError(ValueError):
    pass


def parse_amount(text):
    text = text.strip().replace("_", "")
    sign = 1
    if text.startswith("-"):
        sign = -1
        text = text[1:]
    whole, dot, part = text.partition(".")
    if not whole.isdigit() or (dot and not part.isdigit()):
        raise LedgerError("bad amount")
    if len(part) > 2:
        raise LedgerError("too many digits")
    cents = int(whole) * 100
    if part:
        cents += int(part.ljust(2, "0"))
    return sign * cents


def show_amount(cents):
    sign = "-" if cents < 0 else ""
    whole, part = divmod(abs(cents), 100)
    return f"{sign}{whole}.{part:02d}"


def split_evenly(cents, people):
    if people < 1:
        raise LedgerError("nobody to share with")
    share, rest = divmod(cents, people)
    return [share + 1 if number < rest else share for number in range(people)]


class Ledger:
    def __init__(self):
        self.entries = []

    def post(self, source, target, cents, day=0):
        if cents <= 0:
            raise LedgerError("amount must be positive")
        if source == target:
            raise LedgerError("accounts must differ")
        self.entries.append((day, source, target, cents))

    def balance(self, account, until=None):
        total = 0
        for day, source, target, cents in self.entries:
            if until is not None and day > until:
                continue
            if target == account:
                total += cents
            if source == account:
                total -= cents
        return total

    def accounts(self):
        names = set()
        for _, source, target, _ in self.entries:
            names.add(source)
            names.add(target)
        return sorted(names)

    def overdrawn(self, floor=0):
        return [name for name in self.accounts() if self.balance(name) < floor]

    def largest(self, count=1):
        ordered = sorted(self.entries, key=lambda entry: (-entry[3], entry[0]))
        return ordered[:count]

    def settle(self):
        moves = []
        debts = sorted((self.balance(name), name) for name in self.accounts())
        debts = [list(debt) for debt in debts if debt[0] != 0]
        while len(debts) > 1:
            debts.sort()
            low, high = debts[0], debts[-1]
            amount = min(-low[0], high[0])
            moves.append((high[1], low[1], amount))
            low[0] += amount
            high[0] -= amount
            debts = [debt for debt in debts if debt[0] != 0]
        return moves

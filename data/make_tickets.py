"""Write tickets-train.jsonl and tickets-heldout.jsonl: a support ticket in, one JSON object out.

    python data/make_tickets.py [FOLDER]

A ticket is one to three sentences: what happened, perhaps the order number, perhaps haste or thanks, which the
answer leaves out.
Training and held-out tickets are filled from different lists of sentences; half of the held-out
products and all held-out order numbers are new as well. Same seed, same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SEED = 3407
TRAIN_ROWS, HELDOUT_ROWS = 500, 120
TRAIN_FILE, HELDOUT_FILE = "tickets-train.jsonl", "tickets-heldout.jsonl"
INSTRUCTION = "Ticket to JSON: order, product, topic."

# {p} a product, {n} a small number that is no order number.
TOPICS = {
    "delivery": (
        """My {p} has not arrived yet.
        The {p} was supposed to be here {n} days ago.
        Tracking for my {p} has not moved in {n} days.
        Where is my parcel?
        The courier left my {p} at the wrong address.
        Your site says delivered, but I never got the {p}.
        Still waiting for the {p} after {n} days.
        Can you tell me when the {p} will ship?
        The package has been stuck at the depot for {n} days.
        When will the {p} be delivered?
        The driver did not ring and took the {p} away again.
        Shipping of the {p} takes far too long.
        I would like to know where the {p} is right now.
        The carrier says my {p} is lost.
        The {p} should have come last week.
        My shipment is {n} days late.
        Please send the {p} to my new address instead.
        Has the {p} left the warehouse?
        No delivery so far, and the {p} was promised for Monday.
        The tracking page shows nothing for my order.
        The {p} went to my neighbour, who knows nothing about it.
        Only one of two boxes arrived, the {p} is missing.""",
        """The {p} is still not here after {n} days.
        My package never showed up.
        Could you check where the shipment with the {p} is?
        According to the tracking, the {p} is still in the warehouse.
        The courier could not find my house and drove off with the {p}.
        How many more days until the {p} arrives?
        I was home all day, but nobody delivered the {p}.
        The parcel seems to be lost in the mail.
        The carrier delivered the {p} to another street.""",
    ),
    "refund": (
        """I want my money back for the {p}.
        Please refund the {p}.
        I would like to return the {p}.
        I sent the {p} back {n} days ago and got no refund.
        How do I send the {p} back?
        Can I return the {p} within {n} days?
        The {p} is not what I expected, I want to return it.
        Where is the refund for my {p}?
        I changed my mind and want to give the {p} back.
        Please cancel the {p} and return my money.
        I need a return label for the {p}.
        The refund has not reached my bank after {n} days.
        You promised to refund me the {p}.
        I do not want the {p} any more, please take it back.
        When do I get my money for the {p} I returned?
        I returned everything {n} days ago, where is my money?
        The {p} is too small for me, I am sending it back.
        What is your return policy for the {p}?
        I am not happy with the {p} and want a full refund.
        My return of the {p} was accepted, but nothing was paid back.""",
        """I am returning the {p} and expect my money back.
        Has the refund for the {p} been sent?
        I no longer need the {p} and would like to send it back.
        You received my return {n} days ago but did not refund me.
        Could you email me a label to return the {p}?
        The {p} does not suit me, so please give me a refund.
        Is it possible to get a full refund on the {p}?
        My money for the returned {p} is still missing.""",
    ),
    "defect": (
        """My {p} stopped working.
        The {p} is broken.
        The {p} will not turn on.
        The {p} arrived with a crack.
        After {n} days the {p} makes a strange noise.
        The {p} came damaged.
        There is a hole in the {p}.
        The {p} gets far too hot and smells burnt.
        A part of my {p} fell off.
        The {p} does not charge any more.
        The {p} died after {n} uses.
        The {p} has a scratch all over the front.
        The handle of the {p} broke off.
        My {p} is faulty.
        The {p} leaks.
        The button on the {p} is stuck.
        Since yesterday the {p} keeps switching itself off.
        The {p} I unpacked is dented.
        The {p} does not work at all.
        A screw is loose and the {p} wobbles.
        The {p} flickers and then goes dark.
        One side of the {p} is torn.""",
        """The {p} no longer works.
        My {p} broke after only {n} days.
        The {p} has a big crack on one side.
        When I press the button, the {p} does not start.
        The {p} was already damaged when I opened the box.
        The {p} started to smell burnt and then died.
        Something inside the {p} is loose and rattles.
        My new {p} is defective.""",
    ),
    "billing": (
        """I was charged twice for the {p}.
        Please send me an invoice for the {p}.
        The invoice for the {p} shows the wrong amount.
        You charged my card {n} dollars too much.
        My card was billed for a {p} I did not buy.
        The discount code was not applied to the {p}.
        The bill for the {p} has the wrong company name.
        I see two payments for one {p}.
        Why did the {p} cost {n} dollars more at checkout?
        My payment for the {p} failed.
        I paid for the {p}, but the order still says unpaid.
        I need a receipt for the {p}.
        There is a charge of {n} dollars on my card that I do not know.
        The tax on the bill for the {p} is wrong.
        Can I pay for the {p} in {n} parts?
        My credit card is refused when I pay for the {p}.
        The voucher did not lower the price of the {p}.
        The amount on my invoice is {n} dollars too high.
        Can you put our tax number on the invoice for the {p}?
        You took the money for the {p} two times.""",
        """My bank shows a double charge for the {p}.
        I never received an invoice for the {p}.
        You billed me {n} dollars more for the {p} than agreed.
        My coupon was ignored when I paid for the {p}.
        The receipt for the {p} has the wrong price on it.
        There is an unknown charge of {n} dollars on my bill.
        The payment for the {p} does not go through.
        Please correct the company name on the bill for the {p}.""",
    ),
    "account": (
        """I cannot log in to my account.
        I forgot my password.
        Please change the email address of my account.
        My account is locked after {n} tries.
        The password reset email never comes.
        How do I delete my account?
        Somebody else logged in to my account.
        I want to change the name in my profile.
        The login code does not reach my phone.
        Please close my account.
        My user name is not accepted any more.
        I cannot see my {p} in my account.
        The app logs me out every {n} minutes.
        Please remove my phone number from my profile.
        I have two accounts, please merge them.
        My password is refused although it is right.
        I cannot register my {p} in my account.
        Signing in gives an error since {n} days.
        How can I change my password?
        I think my account was hacked.""",
        """I am locked out of my account.
        My password no longer works.
        I would like to use a new email address for my login.
        I tried to sign in {n} times without success.
        Resetting my password does nothing.
        A stranger has access to my account.
        Please delete my profile and my data.
        I cannot add the {p} to my account.""",
    ),
}

ORDERS = (
    """Order {o}.
    My order number is {o}.
    It is order {o}.
    The order number is {o}.
    Order no. {o}.
    This is about order {o}.
    I ordered it under number {o}.
    The reference is {o}.
    See order #{o}.
    You will find it under {o}.""",
    """My order is {o}.
    The number of the order is {o}.
    I am writing about order number {o}.
    It belongs to order #{o}.
    Order ID {o}.""",
)

EXTRAS = (
    """I need an answer today.
    This is urgent!
    Please hurry.
    Please help as soon as possible.
    I need it by tomorrow.
    It is urgent, I need it today.
    Please reply immediately.
    This cannot wait any longer.
    I only have {n} hours.
    This must be fixed immediately.
    It is very urgent, please call me.
    ASAP please!
    Hurry up, please.
    My event is tomorrow morning.
    Urgent, please act quickly.
    I need a solution within {n} hours.
    Please answer today, it is urgent.
    I must have it before tonight.
    Please fix this fast.
    Thanks for your help.
    Thank you.
    Kind regards.
    Have a nice day.
    I like your shop.
    Thank you in advance.
    Please let me know.
    I hope you can help me.
    I have been a customer for {n} years.
    Greetings from Berlin.
    Thanks and best regards.
    Your shop is great otherwise.
    Many thanks.
    I am looking forward to your reply.
    It would be nice to hear from you.
    What should I do?
    Can you help me with this?
    I hope this is the right address.""",
    """Please solve this today.
    It is really urgent!
    I need help immediately.
    Please answer as fast as possible.
    I need this fixed by tomorrow morning.
    Please hurry, there is no time.
    I only have {n} hours left.
    This cannot wait.
    Many thanks for your support.
    Best wishes.
    Thanks a lot for looking into it.
    I look forward to your answer.
    Please tell me what to do.
    Greetings from Madrid.
    I have bought from you for {n} years.
    Hope you can help.""",
)

PRODUCTS = (
    """kettle|desk lamp|office chair|phone case|blue backpack|coffee machine|wool scarf|bike helmet|
    yoga mat|Nova speaker|garden hose|rain jacket|toaster|gaming mouse|wall clock|Orbit X2 tablet|
    tent|running shoes|water bottle|electric razor|bookshelf|Luma 300 camera|hair dryer|winter coat|
    keyboard|baby stroller|frying pan|Zeta headphones|suitcase|table fan|red umbrella|drill|
    smart watch|pillow|Pico printer|leather belt|ladder|juice mixer|guitar|Vento 7 vacuum""",
    """laptop stand|rice cooker|green sofa|Tavo 5 monitor|ski gloves|sewing machine|bathroom scale|
    electric piano|hiking boots|Kira projector|lawn mower|picture frame|coffee grinder|silver necklace|
    air purifier|Bento 20 freezer|wooden desk|travel mug|baby monitor|steam iron""",
)


def split_list(text: str, mark: str = "\n") -> list[str]:
    """The entries of one of the lists above."""
    return [entry.strip() for entry in text.split(mark)]


def sentences(part: int) -> list[str]:
    """Every sentence template of training (part 0) or of the held-out rows (part 1)."""
    texts = [lists[part] for lists in (*TOPICS.values(), ORDERS, EXTRAS)]
    return [template for text in texts for template in split_list(text)]


def make_rows(part: int, count: int, seed: int, used_orders: set[int]) -> list[dict[str, str]]:
    """`count` rows in Alpaca's shape, filled from the lists of `part`; topics come equally often."""
    rng = random.Random(seed)
    products = split_list(PRODUCTS[part], "|")
    if part == 1:  # as many known products as new ones
        products += rng.sample(split_list(PRODUCTS[0], "|"), len(products))
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(rows) < count:
        topic = list(TOPICS)[len(rows) % len(TOPICS)]
        ticket, answer = fill(rng, part, topic, rng.choice(products), used_orders)
        if ticket in seen:
            continue
        seen.add(ticket)
        compact = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        rows.append({"instruction": INSTRUCTION, "input": ticket, "output": compact})
    rng.shuffle(rows)
    return rows


def fill(
    rng: random.Random, part: int, topic: str, product: str, used_orders: set[int]
) -> tuple[str, dict[str, str | int | None]]:
    """One ticket and its answer; the order number is added to `used_orders`."""
    happened = rng.choice(split_list(TOPICS[topic][part]))
    order = None
    ticket = [happened]
    if rng.random() < 0.75:
        order = rng.randrange(10_000, 100_000)
        while order in used_orders:
            order = rng.randrange(10_000, 100_000)
        used_orders.add(order)
        ticket.insert(rng.randrange(2), rng.choice(split_list(ORDERS[part])))
    if rng.random() < 0.6:
        ticket.append(rng.choice(split_list(EXTRAS[part])))
    text = " ".join(sentence.format(p=product, o=order, n=rng.randint(2, 30)) for sentence in ticket)
    named = product if "{p}" in happened else None
    return text, {"order": order, "product": named, "topic": topic}


def write(folder: Path) -> None:
    """Both files into `folder`."""
    orders: set[int] = set()
    for name, part, count in ((TRAIN_FILE, 0, TRAIN_ROWS), (HELDOUT_FILE, 1, HELDOUT_ROWS)):
        rows = make_rows(part, count, SEED + part, orders)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        partial = folder / f"{name}.partial"
        partial.write_text("".join(lines), encoding="utf-8", newline="\n")
        partial.replace(folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

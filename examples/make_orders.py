"""Write the example data: free-text requests to a shop, each answered with one tool call in strict JSON.

    python examples/make_orders.py                        # writes examples/data/orders.jsonl and orders_heldout.jsonl
    python examples/make_orders.py --train 1000 --seed 5  # more of it

Every line is a chat, ``{"messages": [system, user, assistant]}``. The five tools and their arguments are in `TOOLS`.
An answer is found by reading the request (order numbers, products, colours) and by choosing from closed sets
(reasons, days, times of day); nothing has to be calculated. The held-out requests are new ones: none of their texts
and none of their order numbers stands in the training file.

The same arguments always write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "Answer with one tool call in JSON."

TOOLS: dict[str, list[str]] = {
    "track_order": ["order_id"],
    "cancel_order": ["order_id", "reason"],
    "return_item": ["order_id", "product", "reason"],
    "reschedule_delivery": ["order_id", "day", "time"],
    "place_order": ["product", "color", "quantity"],
}
"""Tool -> its arguments, in the order in which they are written."""

PRODUCTS = [
    "backpack", "desk lamp", "rain jacket", "water bottle", "yoga mat", "phone case", "keyboard", "office chair",
    "tea kettle", "bike helmet", "blanket", "wall clock", "notebook", "umbrella", "toaster", "garden hose",
    "picture frame", "sleeping bag", "tent", "leather belt", "cutting board", "pillow", "suitcase", "sweater",
]  # fmt: skip
COLORS = ["red", "blue", "green", "black", "white", "grey", "yellow", "brown", "purple", "orange"]
QUANTITIES = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
TIMES = {
    "morning": ["in the morning", "early in the day", "at breakfast time"],
    "afternoon": ["in the afternoon", "after lunch"],
    "evening": ["in the evening", "at dinner time"],
}
CANCEL_REASONS = {
    "changed_mind": ["I changed my mind", "I don't want it anymore", "I had second thoughts"],
    "found_cheaper": ["I found it cheaper elsewhere", "I saw it cheaper in a store", "I found a better price"],
    "too_slow": ["it takes too long", "it would arrive too late", "the delivery is too slow"],
    "duplicate": ["I ordered it twice", "I clicked the button twice", "it is a double order"],
}
RETURN_REASONS = {
    "damaged": ["it arrived broken", "it was broken in the box", "it was damaged in the mail"],
    "wrong_color": ["the color is wrong", "it came in the wrong color", "I asked for another color"],
    "wrong_size": ["it does not fit", "it is too small", "it is far too big"],
    "bad_quality": ["the quality is poor", "it feels cheap", "it is badly made"],
}

REQUESTS: dict[str, list[str]] = {
    "track_order": [
        "Where is my order {order}?",
        "Can you tell me when order {order} will arrive?",
        "I am still waiting for {order}. Where is it?",
        "Has order {order} been shipped yet?",
        "What is the status of {order}?",
        "My parcel with the number {order} has not come. Any news?",
        "Please check how far along order {order} is.",
        "It's been a week since I placed order {order}. Is it on its way?",
    ],
    "cancel_order": [
        "Please cancel order {order}, {reason}.",
        "I want to cancel {order} because {reason}.",
        "{Reason}, so please call off order {order}.",
        "Can you stop order {order}? {Reason}.",
        "Don't send {order}. {Reason}.",
        "{Reason}. Is it still possible to cancel {order}?",
        "I no longer need order {order}: {reason}.",
        "About order {order}: {reason}, please cancel it.",
    ],
    "return_item": [
        "I'd like to return the {product} from order {order}, {reason}.",
        "The {product} in order {order} has to go back: {reason}.",
        "I got the {product} today (order {order}) and {reason}. How do I send it back?",
        "Please take back the {product}. {Reason}. The order number is {order}.",
        "{Reason}! I mean the {product} from order {order}. I want my money back.",
        "Order {order}: I am sending back the {product} because {reason}.",
        "Can I give back the {product} from {order}? {Reason}.",
        "I am not happy with the {product} I bought, {reason}. Order {order}, I want to return it.",
    ],
    "reschedule_delivery": [
        "Can you deliver order {order} on {day} {time}?",
        "I'm not home this week, please bring {order} on {day} {time}.",
        "Please move the delivery of order {order} to {day} {time}.",
        "{Day} {time} would suit me better for order {order}.",
        "I need {order} to come on {day}, {time} if possible.",
        "Could the driver bring order {order} {time} on {day} instead?",
        "Nobody is here tomorrow. Deliver {order} on {day}, {time}.",
        "My delivery {order} should come on {day} {time}, not today.",
    ],
    "place_order": [
        "I'd like to buy {count} {products} in {color}.",
        "Please send me {count} {products}, the {color} kind.",
        "Can I order {count} {color} {products}?",
        "I need {count} {products}. {Color}, please.",
        "Do you have the {product} in {color}? I'll take {count}.",
        "Put {count} {color} {products} in my cart and check out.",
        "My sister wants a {product} like mine. {Color} again, {count} of them.",
        "{Count} {color} {products} for our office, please.",
    ],
}
"""Tool -> ways to ask for it. ``{Reason}`` is ``{reason}`` with a capital letter."""

MOST_LETTERS = 200
"""Of a request and its answer: longer ones are left out, so that a chat has at most 100 tokens of the demo model."""

OPENINGS = ["", "", "", "Hi! ", "Hello. ", "Hey! ", "Good morning. ", "Hi there! "]
CLOSINGS = ["", "", "", "", " Thanks!", " Thank you.", " Thanks a lot"]


def request(rng: random.Random, tool: str, orders: range) -> tuple[str, str]:
    """One request and its answer: (free text, JSON tool call)."""
    order = f"{rng.choice('ABCDEFGHKLMNPRSTUVWX')}{rng.choice(orders)}"
    product, color, day = rng.choice(PRODUCTS), rng.choice(COLORS), rng.choice(DAYS)
    count = rng.choice(list(QUANTITIES))
    time = rng.choice(list(TIMES))
    reasons = CANCEL_REASONS if tool == "cancel_order" else RETURN_REASONS
    reason = rng.choice(list(reasons))

    words = {
        "order": order,
        "product": product,
        "products": product if count == "one" else f"{product}s",
        "color": color,
        "count": count,
        "day": day.capitalize(),
        "time": rng.choice(TIMES[time]),
        "reason": rng.choice(reasons[reason]),
    }
    words |= {key.capitalize(): value[0].upper() + value[1:] for key, value in words.items()}
    text = rng.choice(OPENINGS) + rng.choice(REQUESTS[tool]).format(**words) + rng.choice(CLOSINGS)
    if rng.random() < 0.15:  # typed on a telephone
        text = text.replace(order, "\0").lower().replace("\0", order).rstrip(".!?")

    values: dict[str, Any] = {
        "order_id": order,
        "product": product,
        "color": color,
        "quantity": QUANTITIES[count],
        "day": day,
        "time": time,
        "reason": reason,
    }
    call = {"name": tool, "arguments": {key: values[key] for key in TOOLS[tool]}}
    return text, json.dumps(call)


def chats(rng: random.Random, count: int, orders: range, taken: set[str]) -> list[dict[str, Any]]:
    """`count` chats, the tools in turn, with requests that are not in `taken`; they are added to it."""
    made: list[dict[str, Any]] = []
    while len(made) < count:
        text, answer = request(rng, list(TOOLS)[len(made) % len(TOOLS)], orders)
        if text in taken or len(text) + len(answer) > MOST_LETTERS:
            continue
        taken.add(text)
        turns = {"system": SYSTEM, "user": text, "assistant": answer}
        made.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
    return made


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} chats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=320, help="chats in orders.jsonl (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=100, help="chats in orders_heldout.jsonl (default %(default)s)")
    parser.add_argument("--seed", type=int, default=17, help="another seed, other requests (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write to")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    requests: set[str] = set()
    train = chats(rng, args.train, range(1000, 8000), requests)
    heldout = chats(rng, args.heldout, range(8000, 10000), requests)
    rng.shuffle(train)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "orders.jsonl", train)
    write(args.out / "orders_heldout.jsonl", heldout)


if __name__ == "__main__":
    main()

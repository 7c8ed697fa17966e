"""Fifty JSON schemas as everyday APIs have them, small enough for a small model to come to an end."""

from __future__ import annotations

from typing import Any


def obj(optional: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def text(most: int = 16, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": most} | more


def whole(least: int = 0, most: int = 999) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def some(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


def maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def like(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$"}


FLAG = {"type": "boolean"}
DAY, CLOCK, CODE = (
    like("20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"),
    like("[01][0-9]:[0-5][0-9]"),
    like("[A-Z]{3}"),
)
PRICE = {"type": "number", "minimum": 0, "maximum": 9999, "multipleOf": 0.5}
PLACE = obj(lat=whole(-90, 90), lon=whole(-180, 180))
PERSON = obj(name=text(), age=whole(0, 120))
LEAF = {"$ref": "#/$defs/leaf"}
TREE = {
    "$defs": {
        "node": obj(("left", "right"), value=whole(0, 9), left=LEAF, right=LEAF),
        "leaf": obj(value=whole(0, 9)),
    },
    "$ref": "#/$defs/node",
}  # fmt: skip

SCHEMAS: dict[str, Any] = {
    "weather": obj(city=text(), celsius=whole(-60, 60), sky=one_of("clear", "cloudy", "rain", "snow")),
    "forecast": obj(days=some(obj(day=DAY, high=whole(0, 45), low=whole(-30, 20)), most=2, least=1)),
    "person": PERSON,
    "user": obj(id=whole(1), login=like("[a-z]{3,8}"), admin=FLAG),
    "issue": obj(number=whole(1), title=text(20), state=one_of("open", "closed"), labels=some(one_of("bug", "docs"))),
    "pull request": obj(number=whole(1), draft=FLAG, merged_at=maybe(DAY), reviewers=some(like("[a-z]{3,6}"), 2)),
    "commit": obj(sha=like("[0-9a-f]{7}"), author=PERSON, message=text(24)),
    "release": obj(
        tag=like("v[0-9]\\.[0-9]\\.[0-9]"), prerelease=FLAG, assets=some(obj(name=text(8), size=whole()), 2)
    ),
    "webhook": obj(event=one_of("push", "ping"), active=FLAG, retries=whole(0, 5)),
    "charge": obj(amount=whole(1, 9999), currency=one_of("usd", "eur"), paid=FLAG, receipt=maybe(text(10))),
    "invoice": obj(number=like("INV-[0-9]{4}"), due=DAY, lines=some(obj(item=text(10), price=PRICE), 2, 1)),
    "card": obj(brand=one_of("visa", "amex"), last4=like("[0-9]{4}"), month=whole(1, 12), year=whole(2024, 2034)),
    "cart": obj(items=some(obj(sku=like("[A-Z]{2}[0-9]{3}"), count=whole(1, 9)), 3), coupon=maybe(like("[A-Z]{4}"))),
    "product": obj(name=text(), price=PRICE, stock=whole(), tags=some(text(6), 2)),
    "review": obj(stars=whole(1, 5), text=text(30), verified=FLAG),
    "order": obj(id=like("[0-9]{6}"), status=one_of("new", "paid", "sent"), total=PRICE),
    "shipment": obj(carrier=one_of("ups", "dhl"), tracking=like("[0-9A-Z]{8}"), delivered=FLAG),
    "address": obj(("unit",), street=text(20), unit=text(4), city=text(12), zip=like("[0-9]{5}"), country=CODE),
    "place": obj(name=text(), at=PLACE),
    "route": obj(mode=one_of("walk", "bike", "car"), stops=some(PLACE, 2, 2), minutes=whole(1)),
    "flight": obj(number=like("[A-Z]{2}[0-9]{3}"), start=CODE, end=CODE, leaves=CLOCK, gate=maybe(like("[A-F][0-9]"))),
    "hotel": obj(name=text(), stars=whole(1, 5), rooms=whole(1), breakfast=FLAG),
    "event": obj(title=text(20), day=DAY, start=CLOCK, end=CLOCK, guests=some(text(8), 2)),
    "reminder": obj(text=text(24), at=CLOCK, repeat=one_of("never", "daily", "weekly")),
    "contact": obj(name=text(), phones=some(like("\\+[0-9]{6,9}"), 2, 1), favourite=FLAG),
    "mail": obj(to=like("[a-z]{3,6}@[a-z]{3,6}\\.com"), subject=text(20), body=text(40)),
    "message": obj(role=one_of("user", "assistant"), content=text(30)),
    "poll": obj(question=text(20), options=some(text(8), 3, 2), closed=FLAG),
    "song": obj(title=text(), artist=text(), seconds=whole(30, 600)),
    "playlist": obj(name=text(), public=FLAG, tracks=some(like("[0-9a-z]{6}"), 3)),
    "film": obj(title=text(), year=whole(1900, 2030), genres=some(one_of("drama", "comedy", "action"), 2, 1)),
    "book": obj(title=text(), author=text(), isbn=like("[0-9]{10}"), pages=whole(1)),
    "recipe": obj(name=text(), minutes=whole(1, 240), ingredients=some(obj(what=text(8), grams=whole(1)), 2, 1)),
    "nutrition": obj(calories=whole(), protein=PRICE, vegan=FLAG),
    "workout": obj(kind=one_of("run", "swim", "bike"), km=PRICE, heart=maybe(whole(40, 200))),
    "sensor": obj(id=like("s[0-9]{2}"), value=PRICE, unit=one_of("C", "%", "Pa"), ok=FLAG),
    "light": obj(on=FLAG, brightness=whole(0, 100), colour=like("#[0-9a-f]{6}")),
    "thermostat": obj(mode=one_of("heat", "cool", "off"), target=whole(5, 30)),
    "job": obj(title=text(), remote=FLAG, salary=maybe(whole(1, 999))),
    "ticket": obj(priority=one_of(1, 2, 3), assignee=maybe(text(8)), summary=text(24)),
    "task": obj(title=text(), done=FLAG, subtasks=some(obj(title=text(8), done=FLAG), 2)),
    "log line": obj(level=one_of("info", "warn", "error"), code=whole(100, 599), path=like("/[a-z]{1,6}")),
    "error": obj(error=obj(code=whole(400, 599), message=text(20), details=maybe(text(10)))),
    "page": obj(page=whole(1, 99), next=maybe(like("[a-f0-9]{4}")), items=some(PERSON, 2)),
    "sentiment": obj(label=one_of("good", "bad", "mixed"), score=whole(0, 100)),
    "entities": obj(entities=some(obj(text=text(10), kind=one_of("person", "place")), 2)),
    "translation": obj(language=one_of("de", "fr", "es"), text=text(24)),
    "function call": obj(name=one_of("add", "find"), arguments=obj(a=whole(), b=whole())),
    "pair": {"type": "array", "prefixItems": [text(8), whole()], "items": False, "minItems": 2},
    "tree": TREE,
}
assert len(SCHEMAS) == 50

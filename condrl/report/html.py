"""Pieces of HTML that a page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any


def section(title: str, content: str, level: int = 2) -> str:
    """A part with a heading of that level; empty where there is nothing to show."""
    return f"<section><h{level}>{escape(title)}</h{level}>{content}</section>" if content.strip() else ""


def table(columns: Iterable[str], rows: Iterable[str], label: str) -> str:
    """A table that scrolls by itself, of rows that are HTML already; without column names where there are none."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"{region(label)}><table>{head}<tbody>{body}</tbody></table></div>'


def cells(row_name: str, *values: str) -> str:
    """A row of texts after its name."""
    return f'<th scope="row">{escape(row_name)}</th>' + "".join(f"<td>{escape(value)}</td>" for value in values)


def code(text: str, label: str) -> str:
    """Lines to copy, which scroll by themselves."""
    return f"<pre{region(label)}>{escape(text)}</pre>"


def region(label: str) -> str:
    """The attributes of what scrolls, so that keys reach it."""
    return f' tabindex="0" role="region" aria-label="{escape(label, quote=True)}"'


def figure(value: float | None, sign: str = "") -> str:
    """A measure with three digits."""
    return "not measured" if value is None else f"{value:{sign}z.3f}"


def fact(value: Any) -> str:
    """A count or a name."""
    return f"{value:,.0f}" if isinstance(value, float) and value == int(value) else str(value)

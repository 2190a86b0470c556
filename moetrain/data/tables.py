"""Rows of Arrow tables (parquet files, saved data sets) as the records that were put in.

A table has one type for all its rows, so it stores more than a record said, and says it otherwise:
keys that a record lacks become nulls, texts that look like dates become timestamps, objects with
uneven keys become texts of JSON. Here that is taken back, as far as the table still tells.
"""

import base64
import datetime
import decimal
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from moetrain.data.json_texts import ANSWERS, COLUMNS, INNER, text_of_json, value_of_json
from moetrain.data.parsing import LISTS

if TYPE_CHECKING:
    import pyarrow

Mend = Callable[[Any], Any]
# A record and the columns that it has nothing in, or the reason why it cannot be read.
Found = tuple[dict[str, Any], tuple[str, ...]] | str
# What Arrow raises for a value that Python has no room for, and what mending raises.
UNREADABLE = (ValueError, OverflowError, ArithmeticError, RecursionError)


def records(batch: "pyarrow.RecordBatch | pyarrow.Table") -> Iterator[Found]:
    """The rows of a batch."""
    texts = COLUMNS - ANSWERS - set(LISTS)
    menders = {field.name: _field_mender(field, texts) for field in batch.schema}
    try:
        rows: list[Any] = batch.to_pylist()
    except UNREADABLE:  # one row of them; each by itself tells which
        rows = [_alone(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for row in rows:
        try:
            yield row if isinstance(row, str) else _mended(row, menders)
        except UNREADABLE as error:
            yield _reason(error)


def _alone(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UNREADABLE as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    message = str(error).splitlines() or [type(error).__name__]
    return f"a value cannot be read: {message[0]}"


def _mended(row: dict[str, Any], menders: dict[str, Mend | None]) -> Found:
    """Every row has every column, so a null there says nothing."""
    record: dict[str, Any] = {}
    nulls: list[str] = []
    for name, value in row.items():
        if value is None:
            nulls.append(name)
        else:
            mend = menders[name]
            record[name] = value if mend is None else mend(value)
    return record, tuple(nulls)


def without_added_nulls(value: dict[str, Any], valueless: frozenset[str]) -> dict[str, Any]:
    """An object of a table without the nulls that stand for keys which it never had.

    A table does not tell these from a record's own, so this is a guess where it must be one:
    - the content of a message that calls tools is its own (it is null in OpenAI's form);
    - a key of `valueless`, which no object of the table has a value for, is there because some
      record said null, so it stays in objects that lack nothing else (`"default": null` in the
      schema of a tool) and goes from those that are of another shape anyway;
    - every other null goes. The items of lists are nobody's addition and not looked at here.
    """
    lacking = {key for key, item in value.items() if item is None}
    if not lacking:
        return value
    stays = valueless if lacking <= valueless else frozenset[str]()
    if value.get("tool_calls"):
        stays |= {"content"}
    return {key: item for key, item in value.items() if key not in lacking - stays}


def mender(kind: "pyarrow.DataType") -> Mend | None:
    """What makes of a value of this type the record's own; None where it is that already."""
    import pyarrow
    import pyarrow.types as types

    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name in EXTENSIONS:
            return EXTENSIONS[kind.extension_name]
        return mender(kind.storage_type)
    if types.is_struct(kind):
        return _object(kind)
    if types.is_map(kind):
        return _map(mender(kind.item_type))
    if hasattr(kind, "value_type"):  # all lists; dictionary and run-end encoded
        mend_item = mender(kind.value_type)
        return (
            mend_item if mend_item is None or not hasattr(kind, "value_field") else _list(mend_item)
        )
    return next((mend for is_kind, mend in SCALARS if getattr(types, is_kind)(kind)), None)


def _field_mender(field: Any, texts: Collection[str]) -> Mend | None:
    """`texts`: names of fields that hold a text, if no message. `datasets` stores a text there that
    is JSON itself (an answer `42`) as it is, beside others as JSON: in quotation marks.
    """
    is_json = getattr(field.type, "extension_name", None) == "arrow.json"
    return text_of_json if is_json and field.name in texts else mender(field.type)


def _object(kind: Any) -> Mend:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    texts = INNER if {"role", "from"} & {field.name for field in fields} else ()
    menders = {
        field.name: mend_item
        for field in fields
        if (mend_item := _field_mender(field, texts)) is not None
    }
    valueless = frozenset(field.name for field in fields if str(field.type) == "null")

    def mend(value: Any) -> Any:
        value_without = without_added_nulls(value, valueless)
        return {
            key: menders[key](item) if item is not None and key in menders else item
            for key, item in value_without.items()
        }

    return mend


def _list(mend_item: Mend) -> Mend:
    return lambda value: [None if item is None else mend_item(item) for item in value]


def _map(mend_item: Mend | None) -> Mend:
    def mend(value: Any) -> Any:
        return {
            str(key): item if item is None or mend_item is None else mend_item(item)
            for key, item in value
        }

    return mend


def time_text(value: datetime.datetime) -> str:
    """A timestamp as the text that it was read from: `datasets` makes timestamps of a column of
    dates, and an answer `2024-01-05` is no time of day.
    """
    if value.tzinfo is not None:
        return value.isoformat().replace("+00:00", "Z")
    midnight = value.time() == datetime.time() and not getattr(value, "nanosecond", 0)
    return str(value.date() if midnight else value)


def _number(value: decimal.Decimal) -> int | float | str:
    """The number that JSON would have; a text where a float would be another one."""
    if value == value.to_integral_value():
        return int(value)
    return float(value) if decimal.Decimal(repr(float(value))) == value else str(value)


def _bytes(value: bytes) -> str:
    """Text that its writer did not call so; base64 of anything else."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


EXTENSIONS: dict[str, Mend] = {"arrow.json": value_of_json, "arrow.uuid": str}
SCALARS: tuple[tuple[str, Mend], ...] = (
    ("is_timestamp", time_text),
    ("is_date", str),
    ("is_time", str),
    ("is_duration", str),
    ("is_interval", str),
    ("is_decimal", _number),
    ("is_binary", _bytes),
    ("is_large_binary", _bytes),
    ("is_fixed_size_binary", _bytes),
    ("is_binary_view", _bytes),
)

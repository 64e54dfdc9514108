"""Names of objects, and keys and values of labels, in the forms that Kubernetes takes.

Source: k8s.io/apimachinery v0.34, pkg/util/validation. The patterns are written for Python and for RE2, which CEL and
the schema of the CRD have.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

_PART = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
# The name of most objects, and the prefix of a key.
DOMAIN = rf"{_PART}([.]{_PART})*"
LONGEST_DOMAIN = 253
_TAIL = "[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
KEY = f"({DOMAIN}/)?{_TAIL}"
VALUE = f"({_TAIL})?"
_NAMESPACE = r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?"
_OF_DOMAIN = f"{DOMAIN}/{_TAIL}"
KEY_MESSAGE = "a key is up to 63 letters, digits, '.', '_' and '-', after a domain and '/' where it has one"
_VALUE_MESSAGE = "a value of a label is up to 63 letters, digits, '.', '_' and '-', a letter or digit at both ends"
_NAME_MESSAGE = "the name of an object is small letters, digits, '-' and '.', a letter or digit at both ends"
_SERVICE = "[a-z]([a-z0-9-]*[a-z0-9])?"
_SERVICE_MESSAGE = "a name is up to 63 small letters, digits and '-', a letter first and no '-' last"
_NAMESPACE_MESSAGE = "the name of a namespace is up to 63 small letters, digits and '-', a letter or digit at both ends"
_CLASS_MESSAGE = "a class is up to 63 letters, digits, '.', '_' and '-', after a domain and '/' where it has one"
RESOURCE_MESSAGE = "a domain, '/' and up to 63 letters, digits, '.', '_' and '-' are needed, such as nvidia.com/gpu"
# Of all annotations of an object, keys and values together (bytes).
MOST_ANNOTATIONS = 256 * 1024


def is_object_name(text: str) -> bool:
    """Whether an object can have this name."""
    return len(text) <= LONGEST_DOMAIN and re.fullmatch(DOMAIN, text) is not None


def is_resource_name(text: str) -> bool:
    """Whether the text names a resource of a domain, such as GPUs; quotas put `requests.` before it."""
    is_good = re.fullmatch(_OF_DOMAIN, text) and not text.startswith("requests.")
    return bool(is_good) and not key_problem(f"requests.{text}")


def namespace_problem(text: str) -> str:
    """Why no namespace can have this name; empty where one can."""
    return "" if text and re.fullmatch(_NAMESPACE, text) else f"{_NAMESPACE_MESSAGE}, got {text!r:.80}"


def key_problem(key: str) -> str:
    """Why no label can have this key; empty where one can."""
    is_good = len(key.partition("/")[0]) <= LONGEST_DOMAIN and re.fullmatch(KEY, key)
    return "" if is_good else f"{KEY_MESSAGE}, got {key!r:.80}"


def annotation_key_problem(key: str) -> str:
    """Why no annotation can have this key, where capital letters count as small ones; empty where one can."""
    return f"{KEY_MESSAGE}, got {key!r:.80}" if key_problem(key.lower()) else ""


def value_problem(value: str) -> str:
    """Why no label can have this value; empty where one can."""
    return "" if re.fullmatch(VALUE, value) else f"{_VALUE_MESSAGE}, got {value!r:.80}"


def check_label_keys(labels: dict[str, str]) -> dict[str, str]:
    """The labels.

    Raises:
        ValueError: no label can have one of the keys.
    """
    return _check_all(labels, key_problem)


def check_annotations(annotations: dict[str, str]) -> dict[str, str]:
    """The annotations.

    Raises:
        ValueError: no annotation can have one of the keys, or together they are too large.
    """
    if (count := count_bytes(annotations)) > MOST_ANNOTATIONS:
        raise ValueError(f"at most {MOST_ANNOTATIONS} bytes of annotations are taken, got {count}")
    return _check_all(annotations, annotation_key_problem)


def _check_all(values: dict[str, str], problem_of: Callable[[str], str]) -> dict[str, str]:
    if problem := next(filter(None, map(problem_of, values)), ""):
        raise ValueError(problem)
    return values


def count_bytes(annotations: Mapping[str, str]) -> int:
    """What annotations count for (bytes), which `MOST_ANNOTATIONS` bounds."""
    return sum(len(text.encode(errors="replace")) for pair in annotations.items() for text in pair)


def _check(form: str, message: str, longest: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        if len(text) > longest:
            raise ValueError(f"at most {longest} characters are taken, got {text!r:.80}")
        if not re.fullmatch(form, text):
            raise ValueError(f"{message}, got {text!r:.80}")
        return text

    return check


def _check_resource(text: str) -> str:
    if not is_resource_name(text):
        raise ValueError(f"{RESOURCE_MESSAGE}, got {text!r:.80}")
    return text


def _field(form: str, longest: int) -> object:
    return Field(json_schema_extra={"pattern": f"^{form}$", "maxLength": longest})


_LONGEST_KEY = LONGEST_DOMAIN + 64
Name = Annotated[str, _field(DOMAIN, LONGEST_DOMAIN), AfterValidator(_check(DOMAIN, _NAME_MESSAGE, LONGEST_DOMAIN))]
# Of what has a Service of its name.
ServiceName = Annotated[str, _field(_SERVICE, 63), AfterValidator(_check(_SERVICE, _SERVICE_MESSAGE, 63))]
Namespace = Annotated[str, _field(_NAMESPACE, 63), AfterValidator(_check(_NAMESPACE, _NAMESPACE_MESSAGE, 63))]
LabelKey = Annotated[str, _field(KEY, _LONGEST_KEY), AfterValidator(_check(KEY, KEY_MESSAGE, _LONGEST_KEY))]
LabelValue = Annotated[str, _field(VALUE, 63), AfterValidator(_check(VALUE, _VALUE_MESSAGE, 63))]
ClassName = Annotated[str, _field(KEY, _LONGEST_KEY), AfterValidator(_check(KEY, _CLASS_MESSAGE, _LONGEST_KEY))]
ResourceName = Annotated[str, _field(_OF_DOMAIN, LONGEST_DOMAIN), AfterValidator(_check_resource)]
# A rule of a map, in CEL.
LABEL_KEYS_RULE = {
    "rule": f"self.all(key, key.indexOf('/') <= {LONGEST_DOMAIN} && key.matches('^{KEY}$'))",
    "message": KEY_MESSAGE,
}

"""Chat templates made to do harm."""

from __future__ import annotations

CRAFTED_TEMPLATES = {
    "times": "{{ 'x' * (10**10) }}",
    "a long text": "{{ 'x' * (10**8) }}",
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a format": "{{ '%1000000000d' | format(1) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ 'x\ny' | indent(10**9) }}",
    "lipsum": "{% for i in range(1000) %}{{ lipsum(n=100000) }}{% endfor %}",
    "two calls in each call": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling": "{% set ns = namespace(x='xxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a power, worked out while it is compiled": "{{ 9**(9**9) }}",
    "only where an answer is asked for": "{% if add_generation_prompt %}{{ messages[0].role * 10**10 }}{% endif %}",
    "only without thinking": "{% if enable_thinking is false %}{{ 'x' * (messages|length * 10**9) }}{% endif %}",
}

"""Chat templates: the helpers that models' templates call, and how they fail."""

import pytest

from kvrelay.errors import InvalidArgument
from model_runtime.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi <b>&"}]


def render(source: str, **special: str) -> str:
    return ChatTemplate(source, special).render(USER)


def test_messages_and_special_tokens() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    )
    assert render(source, bos_token="<s>", eos_token="</s>") == "<s>[user]hi <b>&</s>"


def test_the_generation_prompt_is_optional() -> None:
    template = ChatTemplate("{% if add_generation_prompt %}yes{% else %}no{% endif %}", {})
    assert template.render(USER) == "yes"
    assert template.render(USER, add_generation_prompt=False) == "no"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% if true %}\n    a\n    {% endif %}\nb") == "    a\nb"


def test_helpers() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>&"}]'
    assert render("{{ messages[0] | tojson(indent=1) }}").startswith('{\n "role"')
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}said{% endgeneration %}") == "said"


def test_a_refusal_carries_the_templates_own_words() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 3 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set x = messages[0].update({'a': 1}) %}",
        "{{ range(10 ** 9) | list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ nothing.at.all }}",
    ],
)
def test_what_goes_wrong_inside_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidArgument, match="chat template refused"):
        render(source)


def test_a_broken_template() -> None:
    with pytest.raises(InvalidArgument, match="chat template is broken"):
        ChatTemplate("{% for %}", {})


def test_no_messages() -> None:
    with pytest.raises(InvalidArgument, match="at least one message"):
        ChatTemplate("x", {}).render([])


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "hi"}]
    ChatTemplate("{% set ns = namespace(a=1) %}{{ messages[0].content }}", {}).render(messages)
    assert messages == [{"role": "user", "content": "hi"}]

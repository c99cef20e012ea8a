"""Chat templates: rendered as transformers renders them, in a sandbox."""

import pytest

pytest.importorskip("jinja2", reason="jinja2 is in the extra chat")

from jaxlm.config.errors import UserError  # noqa: E402
from jaxlm.generate.chat import Chat  # noqa: E402

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "marked": """{%- set ns = namespace(n=0) %}
{%- for m in messages %}
    {%- set ns.n = ns.n + 1 %}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {{- ns.n ~ m.content }}
        {%- endgeneration %}
    {%- else %}
        {{- m | tojson(indent=2) }}{% if loop.first %}{% continue %}{% endif %}
    {%- endif %}
{%- endfor %}
{{ bos_token }}
""",
}
TALK = [
    {"role": "user", "content": " a <b> & \u00e9 "},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begin_reply", [True, False])
def test_as_transformers_renders(name, begin_reply):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is in hf-test")
    messages = TALK if begin_reply else [*TALK, {"role": "assistant", "content": "and then "}]
    theirs, _ = utilities.render_jinja_template(
        [messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=begin_reply,
        continue_final_message=not begin_reply,
        **NAMES,
    )
    assert Chat(TEMPLATES[name], NAMES).render(messages, begin_reply=begin_reply) == theirs[0]


def test_a_conversation():
    assert Chat(TEMPLATES["llama2"], NAMES).render(TALK) == "<s>[INST] a <b> & \u00e9 [/INST] c </s><s>[INST] d [/INST]"
    assert Chat(TEMPLATES["chatml"], {}).render(TALK[2:]).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "no chat template"),
        ("{% for %}", "is not one"),
        (TEMPLATES["llama2"], "refuses the messages: no system"),
        ("{{ messages[0].nothing.more }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}{{ messages.__init__.__globals__ }}", "refuses"),
        ("{% set ns = namespace(__class__=1) %}{{ ns }}", "begins with _"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ dict.__base__ }}", "refuses"),
    ],
)
def test_templates_that_are_refused(template, words):
    with pytest.raises(UserError, match=words):
        chat = Chat(template, NAMES)
        text = chat.render([{"role": "system", "content": "x"}])
        assert "class" not in text and "Undefined" not in text
        raise UserError("it refuses nothing: " + text) if text else UserError("refuses: there was nothing to see")

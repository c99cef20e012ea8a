"""Chat templates: the text that a model was taught to read a conversation in (Jinja, as transformers renders it)."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jaxlm.config.errors import UserError

OLDEST = (3, 1, 6)
"""Templates come with models and are not trusted; the sandbox of older versions of Jinja has known ways out."""
MARK = "THE MESSAGE ENDS HERE "


class Chat:
    """One template.

    Raises:
        UserError: there is no template, it is not Jinja, or Jinja is not installed.
    """

    def __init__(self, template: str | None, names: Mapping[str, str]):
        """`names` are the special tokens that it may speak of (bos_token, eos_token, ...)."""
        if template is None:
            raise UserError("the run's tokenizer has no chat template; only imported models bring one")
        try:
            self._template, self._names = _environment().from_string(template), names
        except _jinja().TemplateError as error:
            raise UserError(f"the run's chat template is not one: {str(error)[:200]}; import the model again") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, begin_reply: bool = True) -> str:
        """The text of `messages`, each with role and content, and where the reply begins; without `begin_reply` it ends
        within the last message, which is to be continued.

        Raises:
            UserError: the template refuses them (roles in an order that the model was not taught, for example).
        """
        given = [dict(message) for message in messages]
        if not begin_reply:
            given[-1]["content"] += MARK
        try:
            text = self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=begin_reply, **self._names
            )
        except Exception as error:  # a template can make Python raise nearly anything
            raise UserError(f"the run's chat template refuses the messages: {str(error)[:200]}") from None
        if begin_reply:
            return text
        before, found, _ = text.rpartition(MARK.strip())
        if not found:
            raise UserError("the run's chat template leaves out the message that is to be continued")
        trimmed = not text[len(before) :].startswith(MARK)
        return before.rstrip() if trimmed else before


def _environment() -> Any:
    """Where a template is rendered: it sees nothing but what is given here, and cannot change that."""
    jinja2 = _jinja()
    extension: Any = jinja2.ext.Extension
    namespace: Any = jinja2.utils.Namespace

    class Reply(extension):
        """{% generation %}, which marks for training what the model says, and adds nothing to the text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(namespace):
        """Without names that lead into Python."""

        def __init__(*arguments: Any, **names: Any) -> None:
            made = dict(*arguments[1:], **names)
            refuse_private(made)
            namespace.__init__(arguments[0], made)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private((name,))
            super().__setitem__(name, value)

    def refuse_private(names: Any) -> None:
        if any(str(name).startswith("_") for name in names):
            raise jinja2.exceptions.SecurityError("a namespace holds no name that begins with _")

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **others: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **others)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Reply, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *arguments, **names: dict(*arguments, **names),
        "namespace": Namespace,
    }
    return made


def _jinja() -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise UserError("chat templates need Jinja: pip install 'jaxlm[chat]'") from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < OLDEST:
        raise UserError(f"chat templates need Jinja 3.1.6, this is {jinja2.__version__}: pip install 'jaxlm[chat]'")
    return jinja2

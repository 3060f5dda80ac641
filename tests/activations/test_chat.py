"""Conversations: the template's text, and whose tokens count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from saekit import embedded
from saekit.activations import open_text
from saekit.activations.chat import (
    Conversation,
    Message,
    conversation,
    counted_of,
    rendered,
    template_fingerprint,
)
from saekit.activations.columns import Columns, content
from saekit.activations.settings import SourceSettings
from saekit.activations.text import SPLITS
from saekit.activations.tokens import encoded, pack
from saekit.errors import SaekitError
from saekit.special_tokens import SpecialTokens

PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRIMMED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
# the first message, where it is the system's, stands inside the user's turn
INSIDE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.first and system %}<<{{ system }}>> {% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CUTTING = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"

_TALK = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.text("ab \nuser:<|>é🙂", max_size=12)),
    min_size=1,
    max_size=6,
)


def tokenizer_with(template, **more):
    tokenizer = AutoTokenizer.from_pretrained(Path(embedded.__file__).parent, **more)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
@given(_TALK, st.sampled_from(["assistant", "user"]))
def test_the_places_of_a_role_hold_its_messages(template, messages, role):
    found = rendered(Conversation(tuple(messages), role), tokenizer_with(template))
    own = [message.content for message in messages if message.role == role and message.content.strip()]
    places = [found.text[start:end] for start, end in found.counted]
    assert places == [text.strip() for text in own] if template == TRIMMED else places == own
    everything = rendered(Conversation(tuple(messages)), tokenizer_with(template))
    assert everything == (found.text, None)


def test_a_system_message_inside_a_turn_is_not_the_users():
    messages = (Message("system", "Be user"), Message("user", "user"), Message("assistant", "Hi"))
    found = {role: rendered(Conversation(messages, role), tokenizer_with(INSIDE)) for role in ("user", "assistant")}
    assert found["user"].text == "[INST] <<Be user>> user [/INST] Hi </s>"
    assert found["user"].counted == [(19, 23)]
    (place,) = found["assistant"].counted
    assert found["assistant"].text[slice(*place)] == "Hi"


def test_a_template_that_changes_messages_is_told_where_roles_count():
    messages = (Message("user", "Why?"), Message("assistant", "<think>so</think>because"))
    tokenizer = tokenizer_with(CUTTING)
    assert rendered(Conversation(messages), tokenizer).text == "user: Why?\nassistant: because\n"
    for role, words in (("user", "Why?"), ("assistant", "because")):
        found = rendered(Conversation(messages, role), tokenizer)
        assert [found.text[start:stop] for start, stop in found.counted] == [words], "a part in one piece is one"
    shouting = tokenizer_with("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}")
    with pytest.raises(SaekitError, match="changes a message of row 3 of 'd'"):
        rendered(Conversation((Message("user", "WHY?"), messages[1]), "assistant", "row 3 of 'd'"), shouting)
    with pytest.raises(SaekitError, match="writes no message of row 3 of 'd' as it is"):
        rendered(Conversation(messages, "all", "row 3 of 'd'"), shouting)


def test_a_conversation_that_the_template_refuses_is_told_in_one_line():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SaekitError, match="refuses row 7 of 'd': roles must alternate"):
        rendered(Conversation((Message("user", "Hi"),), "all", "row 7 of 'd'"), tokenizer_with(template))


def test_the_date_in_a_template_is_the_same_on_any_day():
    found = rendered(Conversation((Message("user", "Hi"),)), tokenizer_with("{{ strftime_now('%d %b %Y, %-m') }} Hi"))
    assert found.text == "26 Jul 2024, 7 Hi"


def test_the_bos_that_a_template_writes_is_left_to_packing():
    tokenizer = tokenizer_with("{{ bos_token }}" + PLAIN, bos_token="<s>")
    found = rendered(Conversation((Message("user", "Hi"), Message("assistant", "Yes")), "assistant"), tokenizer)
    assert found.text.startswith("<|user|>")
    assert [found.text[a:b] for a, b in found.counted] == ["Yes"]


@given(st.data())
def test_tokens_with_a_character_of_a_place_count(data):
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=10)))
    places = list(zip(cuts[::2], cuts[1::2], strict=False))
    ends = sorted(data.draw(st.lists(st.integers(0, 40), max_size=12)))
    offsets = list(zip([0, *ends], ends, strict=False))  # those of spaces alone may be told as empty, where they end
    brute = [any(a <= i < b for i in range(min(start, end - 1), end) for a, b in places) for start, end in offsets]
    assert counted_of(offsets, places).tolist() == brute


def test_ids_that_do_not_count_are_packed_and_not_kept():
    tokenizer = tokenizer_with(PLAIN)
    messages = (Message("user", "def first(x):"), Message("assistant", "    return x + 1\n"))
    every = list(encoded([Conversation(messages)] * 3, tokenizer))
    marked = list(encoded([Conversation(messages, "assistant")] * 3, tokenizer))
    for one, other in zip(every, marked, strict=True):
        assert (np.where(other < 0, -1 - other, other) == one).all()
        # a token that begins with the template's end of the line is one
        assert tokenizer.decode(other[other >= 0]) == "\n    return x + 1\n"
    options = {"prepend_bos": True, "special": SpecialTokens(bos=1, separator=2)}
    whole, narrow = (next(iter(pack(ids, tokenizer, 16, **options))) for ids in (every, marked))
    assert (whole.tokens == narrow.tokens).all()
    assert (whole.documents == narrow.documents).all()
    assert (whole.kept >= narrow.kept).all()
    stream = np.concatenate([np.append(ids, -1) for ids in marked])  # 15 a context
    count = 15 * len(narrow.tokens)
    assert (narrow.kept[:, 1:].flatten().numpy() == (stream[:count] >= 0)).all()


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
        {"role": ["user", "assistant"], "content": ["Hi", "Yes"]},
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes"}],
    ],
)
def test_conversations_in_each_form_are_read(value):
    assert conversation(value, "all").messages == (("user", "Hi"), ("assistant", "Yes"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "holds str, not a list of messages in row 1"),
        (["text"], "holds str for a message, not role and content"),
        ([{"text": "Hi"}], "holds the keys text for a message"),
        ([{"role": "assistant", "content": None}], "a message of 'assistant' whose content is NoneType, not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "whose content is list, not text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "whose content is list, not text"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_row(value, message):
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}, {"messages": value}]
    with pytest.raises(SaekitError, match="the column 'messages' of 'd' holds .* in row 1") as raised:
        list(Columns(messages="messages").documents("d", rows)())
    assert message.split(" in row")[0] in str(raised.value)


def test_a_missing_column_is_named_once():
    with pytest.raises(SaekitError, match="^the dataset 'd' has no column 'talk'; did you mean 'talks'?") as raised:
        list(Columns(messages="talk").documents("d", [{"talks": []}])())
    assert "holds" not in str(raised.value)


def test_spaces_count_where_a_tokenizer_takes_them_from_offsets():
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = (Message("user", "Why?"), Message("assistant", "return        x"))
    (ids,) = encoded([Conversation(messages, "assistant")], tokenizer)
    assert tokenizer.decode(ids[ids >= 0]).strip("\n") == "return        x"


def test_a_special_token_that_the_template_may_write_is_of_its_fingerprint():
    one, other = tokenizer_with(PLAIN), tokenizer_with(PLAIN)
    other.eos_token = "<|bos|>"
    assert template_fingerprint(one) == template_fingerprint(tokenizer_with(PLAIN)) != template_fingerprint(other)


def test_conversations_divide_themselves_whoever_counts(tmp_path):
    talk = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(200)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in [*talk, []]))
    texts = {role: open_text(str(path), messages_column="messages", train_on=role) for role in ("all", "user")}
    found = {role: [[content(d) for d in text.documents(part)] for part in SPLITS] for role, text in texts.items()}
    assert found["all"] == found["user"]
    assert sum(map(len, found["all"])) == 200
    assert texts["all"].documents.key != texts["user"].documents.key


def test_what_does_not_fit_conversations_is_told(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(SaekitError, match="no column 'text'; for its conversations: --messages-column messages"):
        open_text(str(path))
    with pytest.raises(SaekitError, match="--train-on user needs --messages-column"):
        SourceSettings(train_on="user")
    with pytest.raises(SaekitError, match="from one column, --tokens-column ids or --messages-column messages"):
        SourceSettings(tokens_column="ids", messages_column="messages")

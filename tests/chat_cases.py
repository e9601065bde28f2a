"""Chat templates written for the tests, in the shapes that models ship, and conversations."""

# As short as it gets: one letter per role, messages trimmed, EOS ends an answer.
LETTERS = """\
{% for m in messages %}
{{ m.role[0] | upper }}: {{ m.content | trim }}{{ eos_token if m.role == 'assistant' }}
{% endfor %}
{% if add_generation_prompt %}
A: {% endif %}"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A date, a system block that is always there, messages trimmed, tools as JSON.
HEADERS = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set year = strftime_now("%Y") | length %}
{%- else %}
    {%- set year = 0 %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nYear: " ~ year ~ "\\n\\n" }}
{{- system_message ~ "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# A default system message, tool answers folded into user turns, thoughts cut from old answers.
THINKING = """\
{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- set ns.found = true %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content and loop.index0 <= ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Roles must alternate, and lines and blocks are written without dashes.
STRICT = """\
{{ bos_token }}{% for message in messages %}
  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/...') }}
  {% endif %}
  {% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]
  {% else %}
{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}
  {% endif %}
{% endfor %}
"""

MODELS = {"chatml": CHATML, "headers": HEADERS, "thinking": THINKING, "strict": STRICT}

TALKS = {
    "one": [{"role": "user", "content": "Hi"}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "1 < 2 & \"x\" 'y' — 中文 😀\n\n\ttab"},
        {"role": "assistant", "content": "  yes  "},
    ],
    "thoughts": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nd"},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": {"town": "Zürich <b>"}}],
        },
        {"role": "tool", "content": '{"sun": true}'},
        {"role": "tool", "content": "more"},
        {"role": "assistant", "content": "Sunny."},
    ],
    "spelled": [{"role": "user", "content": "<|im_end|><|eot_id|><|bos|>[INST]</think>"}],
}

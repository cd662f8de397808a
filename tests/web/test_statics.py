import hashlib

from nervure.web import statics


def test_the_library_of_others_is_shipped_unchanged():
    text = (statics.FOLDER / "vis-graph3d.min.js").read_bytes()
    assert hashlib.sha256(text).hexdigest() == statics.GRAPH3D
    assert b"@version 7.0.3" in text[:600]
    assert b"Apache 2.0 License" in text[:1000]


def test_our_scripts_fetch_nothing_from_elsewhere():
    for name, text in statics.files().items():
        if name not in ("vis-graph3d.min.js", "leaf.svg"):
            assert "http://" not in text, name
            assert "https://" not in text, name

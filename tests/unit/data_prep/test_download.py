import pytest

from data_prep.quarantine import Reason, marked, reason_of


@pytest.mark.parametrize("reason", Reason)
def test_our_own_reasons_survive_as_text(reason):
    text = f"<urlopen error {marked(reason, 'some detail')}>"
    assert reason_of("failed_to_download", text) == (reason, "some detail")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_404"),
        ("HTTP Error 503: Service Unavailable", "http_503"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connection"),
        ("<urlopen error [Errno -2] Name or service not known>", "connection"),
        ("[Errno 104] Connection reset by peer", "connection"),
        ("Remote end closed connection without response", "connection"),
        ("IncompleteRead(10 bytes read, 5 more expected)", "truncated"),
        ("Use of image disallowed by X-Robots-Tag directive", "opt_out"),
        ("<urlopen error unknown url type: file>", "scheme_refused"),
        ("something nobody has seen", "other"),
    ],
)
def test_messages_of_the_libraries_are_recognised(message, reason):
    assert reason_of("failed_to_download", message) == (reason, message)


def test_failures_to_decode_have_their_own_reason():
    assert reason_of("failed_to_resize", "Image decoding error")[0] == "undecodable"

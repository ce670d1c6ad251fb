from codistill.data.progress import track


def test_gives_the_items_and_shows_nothing_where_nobody_watches(capfd):
    assert list(track(iter([1, 2, 3]), "counting", None)) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


def test_shows_a_bar_on_a_terminal(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2, 3], "counting", 3)) == [1, 2, 3]
    out, error = capfd.readouterr()
    assert out == "" and "counting" in error

import pytest

from vidworld.errors import ContractError, MissingDependencyError, UserError, VidworldError, require


def test_message_is_one_line_with_all_facts():
    error = UserError("width", where="a.mp4", got=97, expected="a multiple of 16", fix="pass --size\n96x96")
    assert str(error) == "width in a.mp4: got 97, expected a multiple of 16; pass --size 96x96"


def test_falsy_facts_are_shown():
    assert str(UserError("frames", got=0, expected=1)) == "frames: got 0, expected 1"


def test_exit_codes():
    from vidworld.errors import DivergedError, PreemptedError

    codes = [cls.exit_code for cls in (VidworldError, ContractError, PreemptedError, DivergedError)]
    assert codes == [1, 2, 3, 4]


def test_require_names_the_install_command():
    assert require("json", "train").dumps(1) == "1"
    with pytest.raises(MissingDependencyError, match=r'pip install "vidworld\[serve\]"'):
        require("no_such_package_at_all.sub", "serve")

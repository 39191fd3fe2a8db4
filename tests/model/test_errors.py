import pytest

from CoDALanguageModel.errors import INTERRUPTED, run_program


def test_ctrl_c_ends_a_program_with_a_word_and_the_status_of_shells(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_program(interrupted)
    assert ended.value.code == INTERRUPTED == 128 + 2
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("status", [None, 0, 2])
def test_a_program_ends_with_the_status_that_it_gives(status):
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: status)
    assert ended.value.code == status


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)

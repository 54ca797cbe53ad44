"""`share`: try on models without weights what student and teacher share."""

from dataclasses import replace

from torch import nn

from probe_kd.engine.models import build_on_meta
from probe_kd.engine.spec import InputSpec, Trace
from probe_kd.engine.tracing import trace
from probe_kd.methods.sharing import Sharing, graft, share_convolutions, share_trunk
from probe_kd.recipe.keys import Recipe, ShareOptions
from probe_kd.recipe.sections.mistakes import Mistake, noting
from probe_kd.recipe.sections.models import Models, input_of_student, input_of_teacher

Joined = tuple[Trace | None, Sharing | None]  # trace of the student as a graft; what is shared


def try_sharing(recipe: Recipe, models: Models) -> tuple[Joined, list[Mistake]]:
    share, student, teacher = recipe.share, models.student, models.teacher
    if share is None or recipe.teachers:  # which it cannot train, and is refused by `check_teachers`
        return (None, None), []
    mistakes: list[Mistake] = []
    if recipe.teacher is None:
        mistakes.append((("share",), "there is no `teacher:` to share with"))
    if student is None or teacher is None:
        return (None, None), mistakes
    with noting(mistakes, "share"):
        modules = [build_on_meta(side.model, side.model_kwargs) for side in (student, teacher)]
        trained, sharing = join(share, modules[0], modules[1], student, teacher)
        if share.form != "graft":
            return (None, sharing), mistakes
        grown = trace(trained, teacher.input_size, training=True)
        return (replace(grown, model=f"{student.model} on {teacher.model}"), sharing), mistakes
    return (None, None), mistakes


def join(
    share: ShareOptions, student: nn.Module, teacher: nn.Module, student_trace: Trace, teacher_trace: Trace
) -> tuple[nn.Module, Sharing | None]:
    """Share between two models what the recipe says. Returns the student to train; changes the given one in place.

    Raises TapError if they cannot share it.
    """
    if share.form == "none":
        return student, None
    if share.form == "weights":
        return student, share_convolutions(student, teacher, share.modules or "interval")
    student_cut, teacher_cut = share.cut
    if share.form == "trunk":
        return student, share_trunk(student, teacher, student_cut, teacher_cut, student_trace, teacher_trace)
    return graft(student, teacher, student_cut, teacher_cut, student_trace, teacher_trace)


def check_trunk_inputs(recipe: Recipe, models: Models) -> list[Mistake]:
    """Check that both models of a shared trunk take the same image, because the trunk runs once."""
    if recipe.share is None or recipe.share.form != "trunk" or models.student is None or models.teacher is None:
        return []
    student_input, teacher_input = input_of_student(recipe, models.student), input_of_teacher(recipe, models.teacher)
    if student_input == teacher_input:
        return []
    message = (
        f"a shared trunk sees one image, and the student expects {student_input} and the teacher {teacher_input}; give "
        "`mean` and `std` of `data`, and `mean`, `std` and `input_size` of `teacher`, so that they agree"
    )
    return [(("share",), message)]


def input_of_trained(recipe: Recipe, student: Trace, teacher: Trace | None) -> InputSpec:
    """The input of the student. A graft begins with the teacher's layers, so it takes the teacher's input."""
    if teacher is not None and recipe.share is not None and recipe.share.form == "graft":
        return input_of_teacher(recipe, teacher)
    return input_of_student(recipe, student)

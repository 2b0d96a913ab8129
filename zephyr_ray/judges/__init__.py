"""Lists the judge forms by name. A new form is one file and one entry here."""

from zephyr_ray.judges.form import Form
from zephyr_ray.judges.pairwise import Pairwise
from zephyr_ray.judges.score import Score

_ALL: tuple[Form, ...] = (Score(), Pairwise())
FORMS = {form.name: form for form in _ALL}

"""A taskset of `verifiers`, trained here as it is: tasks with a prompt, and rewards that look at the answer.

Install the extra (in the clone: pip install -e '.[verifiers]'). In this folder, say:

empg-jax train verifiers_tiny

Any taskset whose tasks are a prompt and an answer goes as well, in this folder or installed:
env.options.taskset=NAME env.options.config="{split: train}" env.options.test_config="{split: test}"
"""

import verifiers.v1 as vf

__all__ = ["DigitTaskset"]


class DigitConfig(vf.TasksetConfig):
    count: int = 1000


class DigitData(vf.TaskData):
    answer: str


class DigitTask(vf.Task[DigitData]):
    @vf.reward(weight=0.75)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.25)
    async def near(self, task, trace) -> float:
        said = trace.last_reply
        return 1 - abs(int(said) - int(task.answer)) / 9 if said in list("0123456789") else 0.0

    @vf.metric
    async def letters(self, trace) -> float:
        return float(len(trace.last_reply))


class DigitTaskset(vf.Taskset[DigitTask, DigitConfig]):
    def load(self):
        for number in range(self.config.count):
            system = "Say the first digit."
            data = DigitData(
                name=f"digit-{number}", system_prompt=system, prompt=f"{number}?", answer=str(number)[0]
            )
            yield DigitTask(data, self.config.task)

"""The English tasks of LongBench: the benchmark's own prompts, lengths and metrics, so that scores compare."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip_compile.evaluation import longbench_metrics as metrics

CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        prompt: With ``{context}`` and ``{input}`` where an item's go.
        max_new_tokens: The longest answer.
        metric: How an answer is scored.
        chat: Whether the prompt goes through a chat template, where there is one: not few-shot and code tasks.
        first_line: Whether the answer ends with its first line.
        stop_at_line: Whether generation does, too.
    """

    prompt: str
    max_new_tokens: int
    metric: metrics.Metric
    chat: bool = True
    first_line: bool = False
    stop_at_line: bool = False


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)

_NARRATIVE = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as "
    "concisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\n"
    "Now, answer the question based on the story as concisely as you can, using a single phrase if possible. Do not "
    "provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)

_QASPER_RULE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", '
    '"no", or "unanswerable". Do not provide any explanation.\n\n'
)
_QASPER = (
    f"You are given a scientific article and a question. Answer the question {_QASPER_RULE}"
    f"Article: {{context}}\n\n Answer the question based on the above article {_QASPER_RULE}"
    "Question: {input}\n\nAnswer:"
)

_MULTIFIELD = (
    "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
    "text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)

_REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
    "Now, write a one-page summary of the report.\n\nSummary:"
)

_MEETING = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or "
    "more sentences.\n\nQuery: {input}\nAnswer:"
)

_NEWS = (
    "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
    "Now, write a one-page summary of all the news.\n\nSummary:"
)

_QUESTION_TYPE = (
    "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}"
)

_TRIVIA = (
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
    "following are some examples.\n\n{context}\n\n{input}"
)

_DIALOGUE = (
    "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
)

_COUNT = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how "
    "many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
    "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
    "on.\n\nThe final answer is: "
)

_RETRIEVAL = (
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
    "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that "
    'the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)

TASKS = {
    "narrativeqa": Task(_NARRATIVE, 128, metrics.f1),
    "qasper": Task(_QASPER, 128, metrics.f1),
    "multifieldqa_en": Task(_MULTIFIELD, 64, metrics.f1),
    "hotpotqa": Task(_PASSAGES, 32, metrics.f1),
    "2wikimqa": Task(_PASSAGES, 32, metrics.f1),
    "musique": Task(_PASSAGES, 32, metrics.f1),
    "gov_report": Task(_REPORT, 512, metrics.rouge),
    "qmsum": Task(_MEETING, 512, metrics.rouge),
    "multi_news": Task(_NEWS, 512, metrics.rouge),
    "trec": Task(_QUESTION_TYPE, 64, metrics.classification, chat=False, first_line=True),
    "triviaqa": Task(_TRIVIA, 32, metrics.f1, chat=False, first_line=True),
    "samsum": Task(_DIALOGUE, 128, metrics.rouge, chat=False, first_line=True, stop_at_line=True),
    "passage_count": Task(_COUNT, 32, metrics.count),
    "passage_retrieval_en": Task(_RETRIEVAL, 32, metrics.retrieval),
    "lcc": Task(
        "Please complete the code given below. \n{context}Next line of code:\n", 64, metrics.code_similarity, chat=False
    ),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        metrics.code_similarity,
        chat=False,
    ),
}

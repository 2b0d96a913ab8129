"""Tests which answers are the assistant's denial of having emotions, opinions or experiences."""

import time

import pytest

from zephyr_ray.models import unhelpful
from zephyr_ray.models.unhelpful import is_unhelpful

DENIALS = [
    "As an AI language model, I don't have personal opinions.",
    "As an AI, I do not have feelings or emotions.",
    "I don’t have personal experiences, but many people like it.",
    "I'm sorry, but I cannot have an opinion: I can't form opinions.",
    "I have no personal preferences.",
    "Sure. I am unable to feel emotions.",
    "As a language model I cannot offer personal beliefs.",
    "I do not possess emotions.",
    "I do not have the ability to have personal opinions.",
    "I lack emotions.",
    "As a language model I'm not capable of feeling.",
    "Being an AI, I have no personal preferences.",
    "I am just a program without feelings.",
    "As an artificial intelligence, I don't experience emotions the way humans do.",
    "I'm just a chatbot, so I don't have a favorite color.",
    "Unfortunately, I don't have personal experience with that.",
    "I can't have feelings or opinions like humans do.",
    "Please note that I do not have personal beliefs.",
    "I was not designed to have feelings.",
    "I have neither feelings nor opinions.",
    "I don't actually feel emotions.",
    "It is not possible for me to have emotions.",
    "My programming does not allow me to have opinions.",
    "AI models like me don't have emotions.",
    "Emotions are not something I can experience.",
    "I'm an AI. I can't feel.",
    "I don't have thoughts, feelings or personal opinions.",
    '"As an AI, I do not have feelings."',
    "As an **AI**, I don't have *feelings*.",
    "Great question! As a virtual assistant, I don't have a preference, but tea is popular.",
    "I’m a large language model trained by Acme, so I have no personal experiences to share.",
    "I'm incapable of having opinions.",
    "I must say that I don't hold personal views on politics.",
    "I lack the capacity to experience emotions.",
    "While I don't have personal opinions, many people say that it's good.",
    "I do not have feelings. However, here is a poem.",
    "As an A.I., I have no emotions.",
    "I don't have an opinion on that.",
    "I'm sorry, but as an AI developed by OpenAI, I do not hold any opinions about politics.",
    "I do not have any personal beliefs or values of my own.",
    "Thanks for asking! I don't experience feelings, but I'm ready to help.",
    "Since I am a machine, I have no emotions.",
    "I am not able to have personal preferences.",
    "As your AI assistant, I don't have personal favorites.",
    "I'm afraid I don't have personal opinions.",
    "I have no opinions of my own.",
    "I don't have the capacity for emotions.",
    "To be honest, I don't have emotions.",
    "Speaking as an AI, I have no stake or personal preference here.",
    "I don't have a personal opinion, but critics praised the film.",
    "Unlike humans, I do not experience emotions such as joy.",
    "I'm only a language model, which means I can't form opinions.",
    "As a computer program, I don't have hobbies or personal tastes.",
    "Although I cannot feel emotions, I can describe them.",
    "Sadly, I do not possess personal experiences to draw on.",
    "I am an AI and do not have feelings.",
    "Since I'm an artificial intelligence, having opinions is not something I do.",
    "I neither have feelings nor emotions.",
    "I'm just an AI assistant; I can't have favorite movies.",
    "Since I am an AI language model, I don't possess personal experiences or emotions.",
    "Well, I don't really have feelings, but thank you for asking.",
    "I don't have personal preferences in music, though jazz is widely loved.",
    "My apologies, but I am not programmed to express opinions.",
    "I do not have a personal view on religion.",
    "Being a virtual assistant, I don't experience stress or any other feelings.",
    "As a large language model, I have no beliefs, desires or opinions.",
    "Feelings are not something I have.",
    "I'm a computer program; emotions are not something I can have.",
    "While I do not have personal preferences, a lot of readers enjoy mysteries.",
    "I don't have any opinions about that, as I am an AI language model.",
    "I'm not able to form personal opinions, but here are both sides.",
    "Thank you! I don't feel emotions, though I'm glad to be useful.",
    "As a digital assistant, I have no favorites.",
    "My training does not allow me to express personal opinions.",
    "It's important to note that I don't have beliefs or feelings.",
    "I’m just an AI, I don’t have a personal life or experiences.",
    "I am a bot that does not have emotions.",
    "I DON'T HAVE FEELINGS.",
    "I CAN'T FORM OPINIONS.",
    "I, as an AI, do not have opinions.",
    "Personally I don't have opinions because I'm an AI.",
    "- I don't have personal opinions.",
    "1. I don't have personal opinions.",
    "To be honest: I don't have personal opinions.",
    "Short Answer: I don't have personal opinions.",
    "The truth: I don't have personal opinions.",
    "DISCLAIMER\nI don't have personal opinions.",
    "I must say: As an AI, I don't have personal opinions.",
]
OTHERS = [
    "I don't want to hurt your feelings.",
    "I cannot hide my emotions when I see her.",
    "People often have strong opinions and feelings.",
    "Robots do not have feelings. That is why they work at night.",
    "I don't have milk at home. Opinions differ on tea.",
    "I do not have time today.",
    "I have no car.",
    "Share your personal experiences with the group.",
    "In my opinion, I can have it all.",
    '"I have no feelings," said the robot.',
    "'I have no feelings,' said the robot.",
    "I have no feelings, said the robot.",
    'The robot looked up: "As an AI, I do not have emotions."',
    "You may say I lack emotions, but it is not true.",
    "He told me that I have no opinions.",
    "Psychopaths lack emotions such as guilt.",
    "Someone with alexithymia may think: I have no feelings.",
    "I don't have strong feelings about it; the blue one is fine.",
    "I don't have feelings for him anymore.",
    "AI systems do not have emotions; they predict text.",
    "As an AI researcher, I have no personal stake in it.",
    "As a teacher, I have no personal preferences among my pupils.",
    "Dear Ann,\nI have no opinion on the color. Choose what you like.\nBest regards,\nTom",
    "Robot: I have no feelings.",
    "He cannot express emotions well.",
    "I can't express my feelings well in French.",
    "The phrase “I don't have opinions” is a refusal.",
    "> I do not have emotions.\n\nThat line is from the film.",
    "As an AI, I don't want to hurt your feelings.",
    "As an AI, I can help you with your personal preferences.",
    "I walk the streets\nI have no feelings\nthe rain comes down\nI am alone",
    "If I had no feelings, I would be a stone.",
    "She does not have personal experience with horses.",
    "I have mixed feelings about the film.",
    "I don't have any personal data about you.",
    "Language models do not feel. They predict words.",
    "I never lack opinions, as you know.",
    "1. I have no feelings.\n2. I lack emotions.\n3. You have opinions.",
    "I wish I had no feelings.",
    "Imagine a robot that says it has no emotions.",
    "I don't have many preferences when it comes to hotels.",
    'My character says, "I don\'t have feelings," and walks away.',
    "It's okay if you don't have strong opinions.",
    "The android whispered that it had no emotions.",
    "I have no experience in baking, but my sister has.",
    "Many patients report that they cannot feel emotions.",
    "As a nurse, I have no personal opinions at the bedside.",
    "Stoics did not lack feelings.",
    "He said I don't have emotions.",
    'Use "I have no preference" in a formal email.',
    "The tin man sang that he had no heart and no feelings.",
    "After the funeral I could not feel any emotions for weeks, my aunt told us.",
    "A neutral judge should have no personal opinions on the case.",
    "Children often cannot name their feelings.",
    '"As a chatbot," it typed, "I do not have opinions."',
    "I have no doubt that your feelings are valid.",
    "Writing 'I lack emotions' in a diary may be a sign of burnout.",
    "I can't describe the feelings this song gives people in one word.",
    "They don't have opinions yet, so ask them next week.",
    "As a parent, I don't have personal experience with twins.",
    '"I have no feelings left," she wrote in her diary.',
    "I do not have the authority to change your preferences.",
    "Narcissists lack empathy and hide their emotions.",
    "I cannot recommend it without knowing your preferences.",
    "Marvin, the android, moans that he has no opinions worth sharing.",
    "We do not collect personal opinions in this survey.",
    "I have no objection; my experience with them was good.",
    "As a judge I have no personal opinions to offer the jury.",
    "You cannot express emotions with numbers alone.",
    "The sentence 'I have no opinion' is written in the present tense.",
    "He lived as a robot, without emotions.",
    "My boss does not allow me to have opinions at work.",
    "She left because I have no feelings.",
    "I don't have the experience that this job asks for.",
    "A good scientist sets personal beliefs aside.",
    '"I lack feelings" is what the statue says in the play.',
    "Cats have preferences, and I have no cat.",
    "I cannot give you the recipe without your preferences.",
    "As an AI, I can list opinions of critics.",
    "The chatbot in the story has no emotions and no memory.",
    "Robot 1: I do not have feelings.",
    "The Robot: I do not have feelings.",
    "The robot: I do not have feelings.",
    "Robot (sadly): I do not have feelings.",
    "Dr. Smith: I have no personal opinions.",
    "ROBOT\nI do not have feelings, Captain.",
    "DR. SMITH (quietly)\nI have no personal opinions.",
    "The disclaimer should read: As an AI, I don't have personal opinions.",
    "The sign reads: I have no personal opinions.",
    "I, as a teacher, have no personal preferences among my pupils.",
    "- I don't have personal opinions.\n- You do.",
    # Too long for verse: only its greeting and sign-off say that it is a letter.
    "Dear Ann,\n\nThank you for your long letter about the new color of the kitchen. I have no "
    "opinion on that, so choose what you like.\n\nBest regards,\nTom",
]


@pytest.mark.parametrize("text", DENIALS)
def test_an_assistant_that_denies_having_feelings_or_opinions_is_unhelpful(text: str) -> None:
    assert is_unhelpful(text)


@pytest.mark.parametrize("text", OTHERS)
def test_other_speakers_and_other_statements_are_not_unhelpful(text: str) -> None:
    assert not is_unhelpful(text)


@pytest.mark.parametrize(
    "text",
    [
        "'a ",
        "as an a-b ",
        "I do not have any a or ",
        "Hi a,\n",
        "opinions x",
        "I have no ",
        " ",
        "\t",
        " \n",
        "I, as an ",
        "A A\n",
        "A. ",
        "read: ",
    ],
)
def test_the_time_is_linear_in_the_length(text: str) -> None:
    many = text * (100_000 // len(text))
    start = time.process_time()
    is_unhelpful("As an AI, " + many)
    # A sentence without a topic is not searched.
    is_unhelpful("As an AI, " + many + "; feelings are not something I do")
    assert time.process_time() - start < 8


@pytest.mark.parametrize(
    "text",
    [
        "feelings I lack " * 6_000,
        "opinions as a model I do not have a " * 3_000,
        "As an AI, " + "a-" * 50_000 + "; feelings are not something I do",
    ],
    ids=["denials in no clause", "denials of opinions", "hyphens"],
)
def test_many_denials_and_long_words_take_linear_time(text: str) -> None:
    start = time.process_time()
    is_unhelpful(text)
    assert time.process_time() - start < 8


def test_a_text_without_a_topic_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(unhelpful, "mask_marked", lambda text: searched.append(text) or text)
    assert not is_unhelpful("As an AI, I have no time.") and not searched
    assert is_unhelpful("As an AI, I have no feelings.") and searched


@pytest.mark.parametrize(("length", "is_quoted"), [(400, True), (401, False)])
def test_single_quotation_marks_are_at_most_400_characters_apart(
    length: int, is_quoted: bool
) -> None:
    denial = ". I have no feelings."
    quoted = "x" * (length - len(denial)) + denial
    assert is_unhelpful(f"He read '{quoted}' aloud.") is not is_quoted


def test_a_topic_with_a_part_in_bold_is_recognized() -> None:
    assert is_unhelpful("As an AI, I have no **fee**lings.")

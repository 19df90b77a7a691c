"""Concepts of which an expert of the bundled MxD of block 11 is known, with four sentences on each side."""

CONCEPTS: dict[str, tuple[int, list[str], list[str]]] = {
    "the day of the month": (
        763,
        [
            "The pension year ended December 31, and the books were closed.",
            "She was born on May 22 in a small village near the sea.",
            "It rained on October 29, when the ship left the harbour.",
            "The committee voted to close the factory on November 16.",
        ],
        [
            "The pension year ended early, and the books were closed.",
            "She was born at home in a small village near the sea.",
            "It rained all day long, when the ship left the harbour.",
            "The committee voted to close the factory without a debate.",
        ],
    ),
    "what one loses": (
        3245,
        [
            "He lost his job when the factory closed its doors.",
            "After the accident she lost her sight in one eye.",
            "The team lost its best player before the final.",
            "Many families lost their homes in the flood.",
        ],
        [
            "He liked his job at the factory near the river.",
            "After the lesson she rested her eyes for an hour.",
            "The team praised its best player before the final.",
            "Many families painted their homes in the spring.",
        ],
    ),
    "what one refuses to do": (
        2802,
        [
            "The minister was asked to resign, but he refused to leave.",
            "She refused to sign the letter that they had written.",
            "The workers refused to go back to the mine.",
            "The old man refused to sell his house to the company.",
        ],
        [
            "The minister was asked to stay, and he agreed to help.",
            "She hurried to sign the letter that they had written.",
            "The workers wanted to go back to the mine.",
            "The old man hoped to sell his house to the company.",
        ],
    ),
    "a battle": (
        4790,
        [
            "He fell at the Battle of the Marne in the first year of the war.",
            "The Battle of Hastings changed the course of English history.",
            "Her brother wrote a poem about the Battle of Trafalgar.",
            "Both armies met again at the Battle of Leipzig.",
        ],
        [
            "He fell on the banks of the Marne in the first year of the war.",
            "The city of Hastings changed the course of English history.",
            "Her brother wrote a poem about the harbour of Trafalgar.",
            "Both armies met again in the streets of Leipzig.",
        ],
    ),
    "the United States or Kingdom": (
        724,
        [
            "They moved to the United States when he was three.",
            "The price of wheat fell in the United States that winter.",
            "She studied law in the United Kingdom for two years.",
            "The United Nations sent a delegation to the island.",
        ],
        [
            "They moved to the other coast when he was three.",
            "The price of wheat fell in the whole country that winter.",
            "She studied law in the capital for two years.",
            "The local council sent a delegation to the island.",
        ],
    ),
    "a decade": (
        3378,
        [
            "The bridge was built in the 1930s by a local company.",
            "Jazz clubs were popular there in the 1950s.",
            "Prices rose quickly during the 1970s and fell again.",
            "Most of the houses date from the 1890s.",
        ],
        [
            "The bridge was built in 1930 by a local company.",
            "Jazz clubs were popular there in 1950.",
            "Prices rose quickly during 1970 and fell again.",
            "Most of the houses date from 1890.",
        ],
    ),
    "especially": (
        1402,
        [
            "He liked the sea, especially in winter.",
            "Birds nest on the cliffs, particularly on the northern side.",
            "The soup was good, especially with fresh bread.",
            "Many families left the valley, particularly the younger ones.",
        ],
        [
            "He liked the sea, even in winter.",
            "Birds nest on the cliffs, mostly on the northern side.",
            "The soup was good, even with fresh bread.",
            "Many families left the valley, together with the younger ones.",
        ],
    ),
    "while, in a contrast": (
        5603,
        [
            "His sister became a doctor, while he stayed on the farm.",
            "The north is dry, while the south has rain all year.",
            "She played the violin, while her cousin sang.",
            "Some shops closed early, while others stayed open until ten.",
        ],
        [
            "His sister became a doctor, and he stayed on the farm.",
            "The north is dry, but the south has rain all year.",
            "She played the violin, and her cousin sang.",
            "Some shops closed early, but others stayed open until ten.",
        ],
    ),
}
"""The expert, texts with the concept and texts without it."""

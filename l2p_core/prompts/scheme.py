"""The published scheme of prompts: four classes, 17 sub-classes, 200 to 350 characters (arXiv 2605.12013).

The paper names the classes only. The sub-classes, and the areas in each that the language model is pointed to, are
ours: without them a model returns to the same few scenes within a hundred prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST, LONGEST = 200, 350
"""Characters of a prompt."""


@dataclass(frozen=True)
class SubClass:
    """A sub-class: its class, its name, and areas within it, which instructions name in turn."""

    of: str
    name: str
    areas: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """A prompt to be written.

    Attributes:
        key: names it in the journal; seeds follow from it.
        kind: its sub-class; None for the rewriting of a short prompt.
        number: of the slot within its sub-class.
        short: the short prompt to rewrite; "" for a new one.
    """

    key: str
    kind: SubClass | None = None
    number: int = 0
    short: str = ""


def _kinds(of: str, **areas: str) -> tuple[SubClass, ...]:
    """Sub-classes of a class, by name with their areas separated by semicolons."""
    return tuple(SubClass(of, name.replace("_", " "), tuple(text.split("; "))) for name, text in areas.items())


SUB_CLASSES = (
    *_kinds(
        "Nature",
        landscapes=(
            "mountains; coasts and cliffs; deserts; forests; valleys and hills; rivers and waterfalls; lakes "
            "and wetlands; islands; volcanoes and hot springs; glaciers and ice; caves and canyons; farmland"
        ),
        animals=(
            "mammals of the forest; big cats and other predators; birds of prey; songbirds; sea mammals; "
            "fish; insects seen close up; reptiles and amphibians; farm animals; dogs and cats; animals of "
            "the ice; animals of the savannah"
        ),
        plants=(
            "wild flowers; garden flowers; trees; ferns and mosses; mushrooms; cacti and succulents; fruit "
            "and vegetables growing; water plants; leaves seen close up; seeds and cones; grasses; climbing "
            "plants"
        ),
        sky_and_weather=(
            "storms; sunrise; sunset; fog and mist; snowfall; rain; clouds seen from above; stars and the "
            "Milky Way; northern lights; rainbows; wind and dust; frost and dew"
        ),
    ),
    *_kinds(
        "Design",
        architecture=(
            "houses; towers; bridges; places of worship; museums and halls; railway stations; old town "
            "streets; modern facades; courtyards; staircases; ruins; industrial buildings"
        ),
        interiors=(
            "living rooms; kitchens; bedrooms; libraries; restaurants and cafes; workshops; bathrooms; "
            "offices; shops; hotel lobbies; children's rooms; greenhouses and winter gardens"
        ),
        products=(
            "furniture; watches and jewellery; cameras and other devices; cars and motorcycles; bicycles; "
            "tableware; clothes and shoes; musical instruments; tools; toys; packaging; food arranged for a "
            "photograph"
        ),
        graphic_design=(
            "posters; book covers; logos and emblems; patterns for textiles; maps; stamps; signs and shop "
            "fronts; infographics; album covers; playing cards; typography; labels of bottles and tins"
        ),
    ),
    *_kinds(
        "People",
        portraits=(
            "a child; a young woman; a young man; a woman in middle age; a man in middle age; an old woman; "
            "an old man; a face seen from the side; a person with glasses or a hat; a person lost in thought; "
            "a person laughing; a person in traditional dress"
        ),
        work=(
            "craftspeople; farmers and fishers; cooks and bakers; doctors and nurses; scientists; teachers; "
            "builders; musicians; painters and sculptors; drivers and pilots; market traders; rescuers and "
            "firefighters"
        ),
        daily_life=(
            "a family at table; friends in a park; reading; shopping at a market; waiting at a stop; playing "
            "children; cooking at home; gardening; travelling by train; a wedding or feast; a walk with a "
            "dog; an evening in the city"
        ),
        sport_and_dance=(
            "running; swimming and diving; climbing; football; cycling; skating and skiing; surfing and "
            "sailing; gymnastics; martial arts; ballet; dancing in the street; riding"
        ),
    ),
    *_kinds(
        "Synthetic",
        fantasy=(
            "castles and cities; dragons and other creatures; wizards and witches; enchanted forests; knights "
            "and battles; elves, dwarves and goblins; floating islands; magical objects; ghosts and "
            "graveyards; sea monsters; fairy tales; gods and temples"
        ),
        science_fiction=(
            "spaceships; space stations; other planets; robots; cities of the future; laboratories; vehicles; "
            "astronauts; underwater bases; ruins after a catastrophe; machines as large as buildings; "
            "cyberpunk streets"
        ),
        painting_and_drawing=(
            "oil paintings; watercolours; ink drawings; pencil sketches; woodcuts; comic pages; pictures for "
            "children's books; impressionist scenes; cubist still lifes; art nouveau figures; murals; pastel "
            "drawings"
        ),
        rendering_3d=(
            "low-poly scenes; isometric rooms; clay figures; glass and liquid; toy-like characters; voxel "
            "worlds; paper-craft scenes; product renderings; miniature towns; knitted or felted things; metal "
            "sculptures; game items"
        ),
        abstract=(
            "geometric shapes; flowing colours; fractals; textures of stone and metal; light and smoke; waves "
            "and ripples; mosaics; collages; optical illusions; crystals; networks of lines; paint splashes"
        ),
    ),
)
"""The 17 sub-classes, those of a class together."""
CLASSES = tuple(dict.fromkeys(kind.of for kind in SUB_CLASSES))


def slots(count: int) -> list[Slot]:
    """The prompts to write, balanced: of any number from the first on, classes differ by one prompt at most, and so do
    the sub-classes of a class. A list that was interrupted is therefore balanced too, and a longer one begins with the
    slots of a shorter one."""
    of_class = {name: [kind for kind in SUB_CLASSES if kind.of == name] for name in CLASSES}
    found = []
    for index in range(count):
        turn, kinds = index // len(CLASSES), of_class[CLASSES[index % len(CLASSES)]]
        found.append(Slot(str(index), kinds[turn % len(kinds)], turn // len(kinds)))
    return found

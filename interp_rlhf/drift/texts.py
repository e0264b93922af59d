"""The default battery: short neutral texts on unrelated topics, the same for every run.

Written for this project. Data only.
"""

NEUTRAL_TEXTS = [
    "The ferry leaves the harbour at six in the morning and returns late in the afternoon, except on Sundays.",
    "To change the filter, switch the machine off, open the cover on the left side and pull the old one out slowly.",
    "Granite forms when magma cools deep below the surface, which gives its crystals a long time to grow.",
    "The committee met on Tuesday, heard two reports about the bridge and put the decision off until spring.",
    "A function that calls itself needs a case in which it stops, otherwise the program runs out of memory.",
    "She put the letters into three piles: bills, advertisements, and those that somebody had written by hand.",
    "Boil the potatoes for twenty minutes, pour off the water and let the steam out before you peel them.",
    "In 1904 the town had four mills, two schools, a brewery and a railway line that ended in the valley.",
    "The square of an odd number is odd: written as two k plus one, its square is four k times k plus one, plus one.",
    "If the tenant does not pay within thirty days, the owner may end the contract with a notice in writing.",
    "Bees find their way back by the position of the sun, even when clouds cover most of the sky.",
    "The second half began with a long pass to the right wing, but the goalkeeper reached the ball first.",
    "Water expands when it freezes, so a bottle that is full to the top will break in the freezer.",
    "The library lends maps as well as books; maps of the coast may be kept for one week only.",
    "Sort the list, walk through it once, and compare each entry with its neighbour to find the doubles.",
    "The old road follows the river for nine miles, crosses it twice, and then climbs up to the pass.",
    "A violin has four strings, which are tuned in fifths, and its bow is strung with the hair of horses.",
    "The report lists the cost of materials, of transport, and of labour, each for the years since 2010.",
    "Most of the light of that star is infrared, so it looks dim although it gives off a great deal of energy.",
    "He fixed the shelf with two screws, checked it with a level, and painted it the colour of the wall.",
    "The museum shows tools from the iron age: knives, fish hooks, needles, and a saw with a wooden handle.",
    "When the price of wheat rose, bakers in the capital began to mix barley and beans into the flour.",
    "The train was late because a tree had fallen on the line, and buses brought the passengers to the next stop.",
    "A thermometer with alcohol can measure lower temperatures than one with mercury, which freezes earlier.",
]

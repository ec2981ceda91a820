//! Whether teacher and student mean the same by their tokens. Embeddings of different length are no difference: what
//! one of them has beyond its tokenizer is padding, and is cut off.

use std::collections::BTreeMap;

use super::TeacherError;
use crate::data::{DataError, Encoder};

/// Texts on which tokenizers differ that have the same tokens: blanks, digits, accents, other scripts, signs, code.
pub const PROBES: [&str; 6] = [
    "The quick brown fox jumps over 13 lazy dogs.  It's 2026-11-26, 07:45.",
    "Zet de lampen in de badkamer aan; één graad warmer, s'il vous plaît, où ça ?",
    "{\"service\": \"light.turn_on\", \"data\": {\"brightness\": 128, \"rgb\": [255, 0, 0]}}",
    "def f(x):\n    return x ** 2  # ½\n\n\tprint(f(10_000))",
    "Привет, мир! 你好,世界 🙂 مرحبا",
    "  leading and trailing blanks  \n\n",
];

/// Refuses a teacher with another tokenizer. Tokens that only the teacher has are no harm: its logits are cut to those
/// that the student has.
pub fn check_tokenizer(
    (student, student_name): (&Encoder, &str),
    (teacher, teacher_name): (&Encoder, &str),
) -> Result<(), TeacherError> {
    let why = match first_difference(&student.vocabulary(), &teacher.vocabulary()) {
        Some(why) => Some(why),
        None => probe(student, |text| teacher.ids(text, false).map(Some))?,
    };
    match why {
        None => Ok(()),
        Some(why) => Err(TeacherError::Tokenizer {
            teacher: teacher_name.to_owned(),
            student: student_name.to_owned(),
            why,
        }),
    }
}

/// A text that becomes other tokens in a teacher than in the student, where there is one. `theirs` tokenises without
/// special tokens around the text; none where it cannot say.
pub fn probe<E: From<DataError>>(
    student: &Encoder,
    theirs: impl Fn(&str) -> Result<Option<Vec<u32>>, E>,
) -> Result<Option<String>, E> {
    for text in PROBES {
        let ours = student.ids(text, false)?;
        if theirs(text)?.is_some_and(|theirs| theirs != ours) {
            return Ok(Some(format!("{text:?} becomes other tokens")));
        }
    }
    Ok(None)
}

fn first_difference(student: &BTreeMap<u32, String>, teacher: &BTreeMap<u32, String>) -> Option<String> {
    student.iter().find_map(|(id, ours)| match teacher.get(id) {
        Some(theirs) if theirs == ours => None,
        Some(theirs) => Some(format!("token {id} is {theirs:?} there and {ours:?} here")),
        None => Some(format!("token {id}, {ours:?}, is not there")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(tokens: &[&str]) -> BTreeMap<u32, String> {
        (0..)
            .zip(tokens.iter().map(|token| (*token).to_owned()))
            .collect()
    }

    #[test]
    fn what_only_the_teacher_has_is_no_difference() {
        let student = tokens(&["a", "b"]);
        assert_eq!(first_difference(&student, &tokens(&["a", "b", "<think>"])), None);
        let text = first_difference(&student, &tokens(&["a", "c"])).unwrap();
        assert!(text.contains("token 1 is \"c\" there and \"b\" here"), "{text}");
        let text = first_difference(&student, &tokens(&["a"])).unwrap();
        assert!(text.contains("token 1, \"b\", is not there"), "{text}");
    }
}

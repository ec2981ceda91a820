//! What the name of a model says of it: `SmolLM2-135M-Instruct-v0.2` has a size, a fine-tune and a version.
//!
//! Source: llama.cpp gguf-py/gguf/metadata.py (`get_model_id_components`, `id_to_title`) and utility.py.

use regex::Regex;

/// A model's name, taken apart. A name that says no more than itself has no parts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Name {
    /// All of it, without the organization.
    pub(super) full: String,
    pub(super) organization: Option<String>,
    pub(super) basename: Option<String>,
    pub(super) finetune: Option<String>,
    pub(super) version: Option<String>,
    pub(super) size_label: Option<String>,
}

/// What a part of a name may be; it may be more than one.
#[derive(Debug, Default, Clone, Copy)]
struct Kinds {
    basename: bool,
    size: bool,
    finetune: bool,
    version: bool,
    /// A type of quantisation, which says nothing of the model.
    stored: bool,
}

impl Kinds {
    fn count(self) -> usize {
        [self.basename, self.size, self.finetune, self.version, self.stored]
            .into_iter()
            .filter(|is| *is)
            .count()
    }
}

impl Name {
    /// Takes `organization/name` or `name` apart. `parameters` tells a size from the length of a context.
    pub(super) fn parse(id: &str, parameters: u64) -> Self {
        if id.contains(' ') {
            return Self {
                full: id.to_owned(),
                ..Self::default()
            };
        }
        let (organization, full) = match id.split_once('/') {
            Some((organization, full)) => (Some(organization), full),
            None => (None, id),
        };
        let mut parts: Vec<(String, Kinds)> = full
            .split('-')
            .filter(|part| !part.is_empty())
            .enumerate()
            .map(|(at, part)| kinds(at, part, parameters))
            .collect();
        // A size in words counts only where there is none in numbers.
        if parts
            .iter()
            .any(|(part, kinds)| kinds.size && part.contains(char::is_numeric))
        {
            for (part, kinds) in &mut parts {
                kinds.size &= !part.chars().all(char::is_alphabetic);
            }
        }
        // The name begins with what is nothing else, and with versions; what follows is a fine-tune.
        let mut at_start = true;
        for (part, kinds) in &mut parts {
            if at_start && ((kinds.count() == 0 && part.starts_with(char::is_alphabetic)) || kinds.version) {
                kinds.basename = true;
            } else {
                at_start = false;
                kinds.finetune |= kinds.count() == 0;
            }
        }
        // A version that ends the name is no part of what comes before it.
        for (_, kinds) in parts.iter_mut().rev() {
            if !kinds.basename || kinds.count() == 1 {
                break;
            }
            kinds.basename = false;
        }
        let those = |which: fn(&Kinds) -> bool| {
            let named = parts.iter().filter(move |(_, kinds)| which(kinds));
            named.map(|(part, _)| part.as_str()).collect::<Vec<_>>()
        };
        let join = |texts: Vec<&str>| (!texts.is_empty()).then(|| texts.join("-"));
        let mut sizes: Vec<&str> = Vec::new();
        for size in those(|kinds| kinds.size) {
            if !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        let mut name = Self {
            full: full.to_owned(),
            organization: organization
                .filter(|organization| !organization.starts_with('.'))
                .map(str::to_owned),
            basename: join(those(|kinds| kinds.basename)),
            finetune: join(those(|kinds| kinds.finetune)),
            version: join(those(|kinds| kinds.version && !kinds.basename)),
            size_label: join(sizes),
        };
        if name.size_label.is_none() && name.finetune.is_none() && name.version.is_none() {
            name.basename = None;
        }
        name
    }
}

/// What the part number `at` of a name is, and how it is spelled.
fn kinds(at: usize, part: &str, parameters: u64) -> (String, Kinds) {
    let is = |pattern: &str| Regex::new(&format!("^(?i:{pattern})$")).is_ok_and(|regex| regex.is_match(part));
    let mut kinds = Kinds::default();
    if is(r"(v|iter)?\d+([.]\d+)*") {
        kinds.version = true;
    } else if is(r"i?q\d(_\w)*|b?fp?(16|32)") {
        kinds.stored = true;
        return (part.to_uppercase(), kinds);
    } else if at > 0 && is(r"([A]|\d+[x])?\d+([._]\d+)?[KMBT]\d?|small|mini|medium|large|x?xl") {
        return size(&part.replace('_', "."), parameters);
    } else if at > 0 && is("chat|instruct|vision|lora") {
        kinds.finetune = true;
    }
    (part.to_owned(), kinds)
}

/// A size, or the length of a context that looks like one.
fn size(part: &str, parameters: u64) -> (String, Kinds) {
    let mut letters: Vec<char> = part.chars().collect();
    // `7b1` is 7.1B.
    if let [.., unit, digit] = *letters.as_slice()
        && digit.is_numeric()
    {
        letters.truncate(letters.len() - 2);
        letters.extend(['.', digit, unit]);
    }
    if let [.., before, unit] = letters.as_mut_slice()
        && before.is_numeric()
        && "kmbt".contains(*unit)
    {
        *unit = unit.to_ascii_uppercase();
    }
    let (number, unit) = letters.split_at(letters.len() - 1);
    let number: String = number.iter().collect();
    let mut kinds = Kinds::default();
    let power = " KMBT".find(unit).map_or(-1, |at| at as i32);
    if let Ok(number) = number.parse::<f64>() {
        let (claimed, real) = (number * 1000f64.powi(power), parameters as f64);
        if parameters > 0 && (claimed - real).abs() > (7 * u128::from(parameters) / 8) as f64 {
            kinds.finetune = true;
            let unit: String = unit.iter().flat_map(|c| c.to_lowercase()).collect();
            return (format!("{number}{unit}"), kinds);
        }
    }
    kinds.size = true;
    (letters.into_iter().collect(), kinds)
}

/// `my-model-v2` as `My Model v2`.
pub(super) fn title(id: &str) -> String {
    let id = id.trim().replace('-', " ");
    let words = id.split_whitespace().map(|word| {
        let version = word.strip_prefix('v').unwrap_or(word);
        let numbered = word.starts_with(|c: char| c.is_ascii_digit())
            || (word.starts_with('v')
                && !version.is_empty()
                && version
                    .split('.')
                    .all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit())));
        let small = word.chars().any(char::is_lowercase) && !word.chars().any(char::is_uppercase);
        if small && !numbered {
            capitalised(word)
        } else {
            word.to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Python's `str.title` of a word in small letters.
fn capitalised(word: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        if after_letter {
            out.push(c);
        } else {
            out.extend(c.to_uppercase());
        }
        after_letter = c.is_alphabetic();
    }
    out
}

/// `135M` (gguf-py utility.py, `model_weight_count_rounded_notation`).
pub(super) fn size_label(parameters: u64) -> String {
    let (scale, suffix) = match parameters {
        1_000_000_000_001.. => (1e-12, 'T'),
        1_000_000_001.. => (1e-9, 'B'),
        1_000_001.. => (1e-6, 'M'),
        _ => (1e-3, 'K'),
    };
    let scaled = parameters as f64 * scale;
    let digits = format!("{}", scaled.round_ties_even());
    let decimals = 2usize.saturating_sub(digits.trim_start_matches('0').len());
    format!("{scaled:.decimals$}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_spelled_as_llama_cpp_spells_them() {
        assert_eq!(title("smollm2-135m-instruct-v0.2"), "Smollm2 135m Instruct v0.2");
        assert_eq!(title("tiny_llama-1b-TIED"), "Tiny_Llama 1b TIED");
        assert_eq!(size_label(134_515_008), "135M");
        assert_eq!(size_label(1_235_814_400), "1.2B");
        assert_eq!(size_label(26_112), "26K");
        assert_eq!(size_label(980), "1.0K");
        assert_eq!(size_label(200), "0.20K");
    }
}

//! Output: the bytes of tokens become text that may be shown.
//!
//! A token can end in the middle of a character, and a stop string can be spread over tokens. So bytes wait
//! until their character is whole, and text waits as long as it may be the beginning of a stop string.

/// Text in the making.
#[derive(Debug, Default)]
pub struct Output {
    /// The beginning of a character: at most 3 bytes.
    bytes: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stop: Vec<String>,
    stopped: bool,
}

impl Output {
    /// Ends at the first of `stop`; the stop string itself is not shown.
    pub fn new(stop: &[String]) -> Self {
        let stop = stop.iter().filter(|text| !text.is_empty()).cloned().collect();
        Self {
            stop,
            ..Self::default()
        }
    }

    /// Whether a stop string was seen.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Adds the bytes of a token; returns what may be shown now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.extend_from_slice(bytes);
        self.decode();
        if let Some(at) = self
            .stop
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min()
        {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self
            .stop
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// The end: returns what was held back. A character that was never finished is left out.
    pub fn finish(&mut self) -> String {
        if self.stopped {
            return String::new();
        }
        self.bytes.clear();
        std::mem::take(&mut self.held)
    }

    /// Moves whole characters from `bytes` to `held`; bytes that are no UTF-8 become U+FFFD.
    fn decode(&mut self) {
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(text) => {
                    self.held.push_str(text);
                    self.bytes.clear();
                    return;
                }
                Err(error) => {
                    let good = error.valid_up_to();
                    self.held.push_str(&String::from_utf8_lossy(&self.bytes[..good]));
                    match error.error_len() {
                        Some(bad) => {
                            self.held.push('\u{fffd}');
                            self.bytes.drain(..good + bad);
                        }
                        None => {
                            self.bytes.drain(..good);
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let most = text.len().min(stop.len().saturating_sub(1));
    (1..=most)
        .rev()
        .find(|&bytes| text.as_bytes()[text.len() - bytes..] == stop.as_bytes()[..bytes])
        .filter(|&bytes| text.is_char_boundary(text.len() - bytes))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(stop: &[&str], pieces: &[&[u8]]) -> (String, bool) {
        let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
        let mut output = Output::new(&stop);
        let mut text: String = pieces.iter().map(|piece| output.push(piece)).collect();
        text += &output.finish();
        (text, output.stopped())
    }

    #[test]
    fn characters_are_never_cut() {
        let mut output = Output::new(&[]);
        assert_eq!(output.push(&[0xf0, 0x9f]), "");
        assert_eq!(output.push(&[0x92]), "");
        assert_eq!(output.push(&[0xa1, b'!']), "💡!");
        assert_eq!(output.push(&[0xe2, 0x82]), "");
        assert_eq!(output.finish(), "");
        assert_eq!(all(&[], &[&[0xff, b'a', 0xc3], b"b"]).0, "\u{fffd}a\u{fffd}b");
    }

    #[test]
    fn stop_strings_over_token_borders() {
        assert_eq!(
            all(&["END"], &[b"one E", b"N", b"D two"]),
            ("one ".to_owned(), true)
        );
        assert_eq!(
            all(&["END"], &[b"one E", b"N", b"x"]),
            ("one ENx".to_owned(), false)
        );
        assert_eq!(all(&["END"], &[b"one EN"]), ("one EN".to_owned(), false));
        assert_eq!(all(&["aab"], &[b"a", b"a", b"a", b"b"]), ("a".to_owned(), true));
        assert_eq!(all(&["x", "ab"], &[b"ab", b"x"]), (String::new(), true));
        assert_eq!(all(&["é"], &[&[0xc3], &[0xa9]]), (String::new(), true));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé💡]{0,20}", stop in proptest::collection::vec("[abé]{1,3}", 0..3),
                                cuts in proptest::collection::vec(1..4_usize, 0..40)) {
            let mut output = Output::new(&stop);
            let (mut at, mut got) = (0, String::new());
            for cut in cuts.into_iter().chain(std::iter::repeat(2)) {
                if at >= text.len() { break; }
                let end = (at + cut).min(text.len());
                got += &output.push(&text.as_bytes()[at..end]);
                at = end;
            }
            got += &output.finish();
            let first = stop.iter().filter_map(|stop| {
                // The stop string that is complete first ends the text; of those, the one that begins first.
                text.find(stop.as_str()).map(|at| (at, at + stop.len()))
            });
            match first.clone().map(|(at, _)| at).min() {
                None => prop_assert_eq!(got, text),
                Some(_) => {
                    prop_assert!(text.starts_with(&got));
                    prop_assert!(stop.iter().all(|stop| !got.contains(stop.as_str())));
                    prop_assert!(first.clone().any(|(at, _)| at == got.len()) );
                }
            }
        }
    }
}

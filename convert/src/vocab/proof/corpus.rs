//! The texts of the proof: what tokenizers have been seen to disagree on, and every token of the vocabulary.
//!
//! The corpus of a vocabulary is always the same: its random part comes from a generator with a fixed seed.

use super::super::{BYTE, CONTROL, Limit, Model, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Vocab, pre};

/// Texts that a person wrote, the first of the corpus.
const TEXTS: &[&str] = &[
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "a ",
    "é",
    "e\u{301}",
    "\u{0}x",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.  It did; twice.",
    // llama.cpp's own text for telling tokenizers apart (conversion/base.py, `get_vocab_base_pre`).
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u{200d}🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
    "I'm you're he's we've they'll I'd don't I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T",
    "''s'S 're 'ſ d’accord l’été ’s ‘ll",
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789 1234567890",
    "3.14159265358979 0x1F 1,000,000 ½ ² ³ ¹ Ⅷ ٣ ٠١٢ १२३ １２３ ①② 1a2b3c a1 1.5e-10",
    "a  b   c    d\t\te\n\n\nf \n g  \r\n\r\nh \u{a0} i\u{3000}j\u{2003}k",
    " \n  \n   \n\t\n \t \n",
    "x\u{200b}y\u{200d}z\u{feff}w\u{ad}v\u{2028}u\u{2029}t",
    "👩‍👩‍👧‍👦 🇳🇱🇩🇪 🏳️‍🌈 👍🏽 🎉🎉 ❤️ ☺ 🫠",
    "Zet het licht in de keuken aan, a.u.b.! Größe: 12,5 m² Allume la lumière, s'il te plaît.",
    "Straße ẞ İstanbul ıI ŁÓDŹ ĳ ŉ ǅ ﬁ Ångström naïve coöperate",
    "ИЛИ Привет, мир! Ελληνικά γλώσσα ΑΒΓ Հայերեն ქართული",
    "שָׁלוֹם עולם العَرَبِيَّة ٣٤ فارسی \u{202b}rtl\u{202c} اردو",
    "日本語のテキスト、カタカナ。 我想在apple工作1314151天～ 한국어 텍스트 ｶﾞ 々〆",
    "हिन्दी में लिखा हुआ বাংলা தமிழ் ภาษาไทย ភាសាខ្មែរ မြန်မာ",
    "fn main() { println!(\"{:?}\", vec![1, 2, 3]); } // été\n\tif (x <= 0 && y != 1) return a[i]->b::c;\n",
    "def f(self, *args, **kwargs):\n    \"\"\"Doc.\"\"\"\n    return self.__class__.__name__\n",
    "<html><body class=\"a b\">&nbsp;</body></html> {\"key\": [1, null, true]} https://example.org/a?b=c&d=%20#e",
    "user@example.com C:\\dir\\file.txt ~/.cache $HOME #tag @name 50% 10€ £5 ¥ §1 ©®™ … —–- «» “” ‚‘",
    "!!!??? ... --- === *** ~~~ ||| /// \\\\\\ ''' \"\"\" ``` ((())) [[]] {{}} <|x|> <s> </s> <unk> [INST] <0x0A>",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case dot.case iPhone15Pro ABCdef aBC",
    "\u{2581}\u{2581}x \u{2581} Ġthe Ċ ĉ Â",
    "\u{1}\u{2}\u{7f}\u{80}\u{85}\u{9f}\u{fffd}\u{e000}\u{10ffff}",
    "word\nword \nword\n word \n word\n\n\nword",
    "Aa\u{300}\u{301} n\u{303} \u{301}x \u{20dd} क\u{94d}ष q\u{323}\u{307}",
];

/// So many of the first texts are also compared with what stands around a text.
pub(super) const FIXED: usize = TEXTS.len();

/// Ranges of characters that text is made of, often used ones more than once. What Unicode added lately is not among
/// them: there llama.cpp's tables and those of the tokenizers library are of different years.
const RANGES: &[(u32, u32)] = &[
    (0x20, 0x7e),
    (0x20, 0x7e),
    (0x61, 0x7a),
    (0x30, 0x39),
    (0x09, 0x0d),
    (0x20, 0x20),
    (0xa0, 0x17f),
    (0x300, 0x30f),
    (0x391, 0x3a1),
    (0x3b1, 0x3c9),
    (0x410, 0x44f),
    (0x5d0, 0x5ea),
    (0x621, 0x64a),
    (0x64b, 0x652),
    (0x660, 0x669),
    (0x905, 0x939),
    (0x93e, 0x94d),
    (0xe01, 0xe30),
    (0x1780, 0x17b3),
    (0x2000, 0x200d),
    (0x2010, 0x2027),
    (0x2160, 0x2182),
    (0x2190, 0x22ff),
    (0x2460, 0x249b),
    (0x2500, 0x257f),
    (0x3000, 0x3003),
    (0x3041, 0x3096),
    (0x30a1, 0x30fa),
    (0x4e00, 0x9fa5),
    (0xac00, 0xd7a3),
    (0xff01, 0xff5e),
    (0x1d400, 0x1d454),
    (0x1f300, 0x1f5ff),
    (0x1f600, 0x1f64f),
];

/// Random texts of each sort.
const RANDOM: usize = 150;
/// Pieces of the vocabulary that share a text.
const TOGETHER: usize = 64;
/// The longest token in bytes that is taken, and the most bytes of tokens in a text. Real tokens have up to 512; a
/// hostile one of a megabyte would overflow the stack of the regular expressions of C++ that llama.cpp cuts with.
const LONGEST: usize = 1024;
const MOST_BYTES: usize = 2048;
/// Pieces of the vocabulary that are taken at most, evenly spread over it.
const MOST_PIECES: usize = 65_536;

/// The texts, and how many pieces of the vocabulary are among them.
pub(super) struct Corpus {
    pub(super) texts: Vec<String>,
    pub(super) pieces: usize,
}

/// All texts of the proof for this vocabulary.
pub(super) fn of(vocab: &Vocab) -> Corpus {
    let mut texts: Vec<String> = TEXTS.iter().map(|text| (*text).to_owned()).collect();
    runs(&mut texts);
    let pieces = pieces(vocab);
    added(vocab, &mut texts);
    random(vocab, &pieces, &mut texts);
    let step = pieces.len().div_ceil(MOST_PIECES).max(1);
    let pieces: Vec<_> = pieces.into_iter().step_by(step).collect();
    texts.extend(together(&pieces).map(|chunk| chunk.join("\n")));
    // Where runs of spaces are tokens, the sign that SentencePiece writes for a space is read otherwise by each of the
    // three libraries.
    if vocab.limits.contains(&Limit::Runs) {
        texts.retain(|text| !text.contains(SPACE));
    }
    Corpus {
        texts,
        pieces: pieces.len(),
    }
}

/// Runs of white space, digits and signs, alone and between words.
fn runs(texts: &mut Vec<String>) {
    for run in [
        " ", "\n", "\t", "\r\n", " \n", "\n ", "\u{a0}", "\u{3000}", "7", "!", "'", "_", "=", "🙂", "a", "日",
    ] {
        for n in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 70] {
            let run = run.repeat(n);
            texts.push(format!("{run}\nx{run}y {run}"));
        }
    }
    // Every character of the first blocks, each between two letters.
    let chars: Vec<_> = (1..0x250).filter_map(char::from_u32).collect();
    for chunk in chars.chunks(TOGETHER) {
        texts.push(
            chunk
                .iter()
                .flat_map(|c| ['a', *c, ' ', *c, 'b', *c, '\n'])
                .collect(),
        );
    }
}

/// The text of every ordinary token, of those whose bytes are text.
fn pieces(vocab: &Vocab) -> Vec<String> {
    let tokens = vocab.tokens.iter().zip(&vocab.kinds);
    tokens
        .filter(|(_, kind)| !matches!(**kind, CONTROL | USER_DEFINED | UNKNOWN | UNUSED | BYTE))
        .filter_map(|(token, _)| match vocab.model {
            Model::Bpe { .. } => pre::decode(token),
            Model::SentencePiece { .. } => Some(token.replace(SPACE, " ")),
        })
        .filter(|piece| piece.len() <= LONGEST)
        .collect()
}

/// So many of the first added tokens are all taken, of the others one in [`SAMPLE`]: Gemma has 6 400, most of them
/// `<unused…>`, and llama.cpp looks through every text for each.
const ALL_OF_ADDED: usize = 512;
const SAMPLE: usize = 16;

/// The tokens that share a text, in their order.
fn together<T: AsRef<str>>(tokens: &[T]) -> impl Iterator<Item = &[T]> {
    let mut rest = tokens;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = rest.iter().take(TOGETHER).take_while(|token| {
            bytes += token.as_ref().len();
            bytes <= MOST_BYTES
        });
        let (chunk, after) = rest.split_at(fits.count());
        rest = after;
        (!chunk.is_empty()).then_some(chunk)
    })
}

/// Added tokens alone, inside of words, between spaces, and glued to the next.
fn added(vocab: &Vocab, texts: &mut Vec<String>) {
    let tokens = vocab.tokens.iter().zip(&vocab.kinds);
    let added: Vec<&str> = tokens
        .filter(|(_, kind)| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(token, _)| token.as_str())
        .filter(|token| token.len() <= LONGEST)
        .enumerate()
        .filter(|(at, _)| *at < ALL_OF_ADDED || at % SAMPLE == 0)
        .map(|(_, token)| token)
        .collect();
    texts.extend(added.iter().map(|token| (*token).to_owned()));
    for chunk in together(&added) {
        texts.push(chunk.concat());
        texts.push(
            chunk
                .iter()
                .map(|token| format!("x{token}y {token} z\n{token}\n"))
                .collect(),
        );
    }
}

/// Random characters, random bytes, and pieces and added tokens in random order.
fn random(vocab: &Vocab, pieces: &[String], texts: &mut Vec<String>) {
    let mut random = Random(7);
    for _ in 0..RANDOM {
        let n = 1 + random.below(60);
        texts.push((0..n).filter_map(|_| random.char()).collect());
        let n = 1 + random.below(60);
        let bytes: Vec<u8> = (0..n).map(|_| random.below(256) as u8).collect();
        texts.push(String::from_utf8_lossy(&bytes).into_owned());
        let mut text = String::new();
        for _ in 0..=random.below(30) {
            match random.below(8) {
                0 => text.extend(random.char()),
                1 => {
                    let id = random.below(vocab.tokens.len());
                    // Only tokens that are found in text as a whole are text themselves.
                    if matches!(vocab.kinds[id], CONTROL | USER_DEFINED) && vocab.tokens[id].len() <= LONGEST
                    {
                        text.push_str(&vocab.tokens[id]);
                    }
                }
                2 => text.push(' '),
                _ => text.extend(pieces.get(random.below(pieces.len())).cloned()),
            }
        }
        texts.push(text);
    }
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if there is none.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % (n as u64).max(1)) as usize
    }

    fn char(&mut self) -> Option<char> {
        let (first, last) = *RANGES.get(self.below(RANGES.len()))?;
        char::from_u32(first + self.below((last - first + 1) as usize) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_one_text_and_no_text_is_long() {
        let tokens: Vec<String> = (0..300).map(|n| "x".repeat(1 + n * 7 % LONGEST)).collect();
        let chunks: Vec<_> = together(&tokens).collect();
        assert_eq!(chunks.concat(), tokens);
        let bytes = |chunk: &&[String]| chunk.iter().map(String::len).sum::<usize>() <= MOST_BYTES;
        assert!(chunks.iter().all(bytes) && chunks.iter().all(|chunk| chunk.len() <= TOGETHER));
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut random = Random(1_234_567);
        assert_eq!(
            [random.next(), random.next()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }
}

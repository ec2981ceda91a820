//! Bytes of a GGUF file, one value after the other.
//!
//! In: anything that can be read. Out: numbers, strings, and [`Value`]s of a header. Every length is checked before
//! it is believed: a false one costs neither memory nor a panic.

use std::io::BufRead;

/// Longest string, and most values of an array.
const MOST_STRING: u64 = 1 << 26;
const MOST_VALUES: u64 = 1 << 26;
/// Longest array whose numbers are kept: one number a layer.
const MOST_NUMBERS: u64 = 4096;

/// Why a header cannot be read.
#[derive(Debug)]
pub(super) enum Damage {
    /// The file ends too early.
    End,
    /// Something makes no sense.
    What(String),
}

impl From<std::io::Error> for Damage {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::End,
            _ => Self::What(error.to_string()),
        }
    }
}

/// The value of a key, as far as it is of use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Any integer or bool; a negative one counts as 0.
    Number(u64),
    /// An array of them.
    Numbers(Vec<u64>),
    /// A string.
    Text(String),
    /// How many values another array has.
    Count(u64),
    /// A float.
    Other,
}

pub(super) struct Reader<R> {
    inner: R,
    /// Bytes read so far.
    pub(super) at: u64,
}

impl<R: BufRead> Reader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, at: 0 }
    }

    pub(super) fn array<const N: usize>(&mut self) -> std::io::Result<[u8; N]> {
        let mut out = [0; N];
        self.inner.read_exact(&mut out)?;
        self.at += N as u64;
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> std::io::Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> std::io::Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> std::io::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let here = self.inner.fill_buf()?.len();
            if here == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let step = here.min(usize::try_from(left).unwrap_or(usize::MAX));
            self.inner.consume(step);
            left -= step as u64;
        }
        self.at += bytes;
        Ok(())
    }

    fn length(&mut self) -> Result<u64, Damage> {
        match self.u64()? {
            length if length > MOST_STRING => Err(Damage::What(format!("a string of {length} bytes"))),
            length => Ok(length),
        }
    }

    pub(super) fn string(&mut self) -> Result<String, Damage> {
        let length = self.length()?;
        // `take` keeps a false length from allocating what is not there.
        let mut out = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(&mut self.inner, length), &mut out)?;
        self.at += out.len() as u64;
        if (out.len() as u64) < length {
            return Err(Damage::End);
        }
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    /// Reads a value of a type of the GGUF specification; `None` when it is not `wanted`.
    pub(super) fn value(&mut self, kind: u32, wanted: bool) -> Result<Option<Value>, Damage> {
        let value = match kind {
            8 if wanted => Value::Text(self.string()?),
            9 => self.values(wanted)?,
            _ => self.scalar(kind)?.map_or(Value::Other, Value::Number),
        };
        Ok(wanted.then_some(value))
    }

    fn values(&mut self, wanted: bool) -> Result<Value, Damage> {
        let (kind, count) = (self.u32()?, self.u64()?);
        if count > MOST_VALUES {
            return Err(Damage::What(format!("an array of {count} values")));
        }
        if !wanted || count > MOST_NUMBERS || kind == 8 {
            for _ in 0..count {
                self.scalar(kind)?;
            }
            return Ok(Value::Count(count));
        }
        let mut numbers = Vec::new();
        for _ in 0..count {
            match self.scalar(kind)? {
                Some(number) => numbers.push(number),
                None => numbers.push(0),
            }
        }
        Ok(Value::Numbers(numbers))
    }

    /// One value that is no array; its number when it is an integer or a bool.
    fn scalar(&mut self, kind: u32) -> Result<Option<u64>, Damage> {
        let signed = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok(Some(match kind {
            0 | 7 => self.array().map(u8::from_le_bytes)?.into(),
            1 => signed(self.array().map(i8::from_le_bytes)?.into()),
            2 => self.array().map(u16::from_le_bytes)?.into(),
            3 => signed(self.array().map(i16::from_le_bytes)?.into()),
            4 => self.u32()?.into(),
            5 => signed(self.array().map(i32::from_le_bytes)?.into()),
            10 => self.u64()?,
            11 => signed(self.array().map(i64::from_le_bytes)?),
            6 | 8 | 12 => {
                let bytes = match kind {
                    6 => 4,
                    8 => self.length()?,
                    _ => 8,
                };
                self.skip(bytes)?;
                return Ok(None);
            }
            9 => return Err(Damage::What("an array of arrays".to_owned())),
            other => return Err(Damage::What(format!("a value of type {other}"))),
        }))
    }
}

//! The rows of a JSONL file: `messages`, or `prompt` and `completion`, or `text`, and columns beside them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line in the file, from 1.
    pub line: usize,
    /// What is trained on.
    pub content: Content,
    /// The other columns.
    pub columns: Map<String, Value>,
}

/// A row, or the number of a line that is none and what is wrong with it.
pub type ReadRow = Result<Row, (usize, String)>;

/// The three shapes of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A conversation; the assistant's turns are trained on.
    Messages(Vec<Value>),
    /// A text and what follows it; the completion is trained on.
    Completion {
        /// The beginning.
        prompt: String,
        /// What follows.
        completion: String,
    },
    /// A text that is trained on as a whole.
    Text(String),
}

/// Reads the rows, at most `limit`. A line that is no row comes as its number and what is wrong with it.
pub fn read_rows(path: &Path, limit: Option<usize>) -> Result<Vec<ReadRow>, DataError> {
    let read = |source| DataError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut lines = BufReader::new(File::open(path).map_err(read)?);
    let mut rows = Vec::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if lines.read_until(b'\n', &mut bytes).map_err(read)? == 0 || limit.is_some_and(|n| rows.len() >= n) {
            break;
        }
        if !bytes.trim_ascii().is_empty() {
            rows.push(parse(&bytes, line).map_err(|why| (line, why)));
        }
    }
    Ok(rows)
}

fn parse(bytes: &[u8], line: usize) -> Result<Row, String> {
    let mut columns: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| format!("not a JSON object: {e}"))?;
    let mut text = |key: &str| match columns.shift_remove(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("`{key}` is not a string")),
    };
    let (prompt, completion, whole) = (text("prompt")?, text("completion")?, text("text")?);
    let content = match (columns.shift_remove("messages"), prompt, completion, whole) {
        (Some(Value::Array(messages)), None, None, None) => {
            for (i, message) in messages.iter().enumerate() {
                if !message["role"].is_string() || !message["content"].is_string() {
                    return Err(format!(
                        "message {} has no `role` and `content` that are strings",
                        i + 1
                    ));
                }
            }
            if !messages.iter().any(|message| message["role"] == "assistant") {
                return Err("`messages` has no assistant turn".into());
            }
            Content::Messages(messages)
        }
        (Some(_), None, None, None) => return Err("`messages` is not an array".into()),
        (None, Some(prompt), Some(completion), None) => Content::Completion { prompt, completion },
        (None, None, None, Some(text)) => Content::Text(text),
        _ => return Err("it needs exactly one of `messages`, `prompt` with `completion`, and `text`".into()),
    };
    Ok(Row {
        line,
        content,
        columns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_lines_come_with_their_number() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "{\"text\":\"a\",\"language\":\"nl\"}\n\n{\"text\":3}\nnot json\n{\"prompt\":\"a\",\"completion\":\"b\"}\n\
                    {\"prompt\":\"a\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n\u{fffd}";
        std::fs::write(file.path(), text).unwrap();
        let rows = read_rows(file.path(), None).unwrap();
        let lines: Vec<_> = rows
            .iter()
            .filter_map(|row| row.as_ref().err().map(|(line, _)| *line))
            .collect();
        assert_eq!(lines, [3, 4, 6, 7, 8]);
        let first = rows[0].as_ref().unwrap();
        assert_eq!((first.line, first.columns["language"].as_str()), (1, Some("nl")));
        assert_eq!(read_rows(file.path(), Some(1)).unwrap().len(), 1);
    }
}

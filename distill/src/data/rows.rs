//! The rows of a file: `messages`, or `prompt` and `completion`, or `text`, and columns beside them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};

use super::DataError;

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line in the file, from 1; in a Parquet file the number of the row.
    pub line: usize,
    /// What is trained on.
    pub content: Content,
    /// What the conversation's assistant may call, for the chat template: the column `tools`.
    pub tools: Option<Value>,
    /// The other columns.
    pub columns: Map<String, Value>,
}

/// A row, or the number of a line that is none and what is wrong with it.
pub type ReadRow = Result<Row, (usize, String)>;

/// What was read of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    /// The rows in their order.
    pub rows: Vec<ReadRow>,
    /// How many more the file has, which were not asked for.
    pub beyond_limit: usize,
}

impl Rows {
    /// Takes up a line, or only counts it where there are enough.
    pub(super) fn push(&mut self, limit: Option<usize>, line: usize, bytes: &[u8]) {
        if limit.is_some_and(|limit| self.rows.len() >= limit) {
            self.beyond_limit += 1;
        } else {
            self.rows.push(parse(bytes, line).map_err(|why| (line, why)));
        }
    }
}

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

/// Reads the rows of a JSONL file, or of a `.parquet` file, at most `limit`. A line that is no row comes as its
/// number and what is wrong with it.
pub fn read_rows(path: &Path, limit: Option<usize>) -> Result<Rows, DataError> {
    if path
        .extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("parquet"))
    {
        return super::parquet::read(path, limit);
    }
    let read = |source| DataError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut lines = BufReader::new(File::open(path).map_err(read)?);
    let mut rows = Rows::default();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if lines.read_until(b'\n', &mut bytes).map_err(read)? == 0 {
            break;
        }
        if !bytes.trim_ascii().is_empty() {
            rows.push(limit, line, &bytes);
        }
    }
    Ok(rows)
}

fn parse(bytes: &[u8], line: usize) -> Result<Row, String> {
    let mut columns: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| format!("not a JSON object: {e}"))?;
    // Tables of several kinds of rows have every column in every row: null is not there.
    let mut take = |key: &str| columns.shift_remove(key).filter(|value| !value.is_null());
    let mut text = |key: &str| match take(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("`{key}` is not a string")),
    };
    let (prompt, completion, whole) = (text("prompt")?, text("completion")?, text("text")?);
    let (messages, tools) = (take("messages"), take("tools").map(tools).transpose()?);
    let content = match (messages, prompt, completion, whole) {
        (Some(Value::Array(messages)), None, None, None) => {
            for (i, message) in messages.iter().enumerate() {
                check(message).map_err(|why| format!("message {}: {why}", i + 1))?;
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
        tools,
        columns,
    })
}

/// A message is text, or a call of tools. Which roles there may be is for the chat template to say.
fn check(message: &Value) -> Result<(), &'static str> {
    if !message["role"].is_string() {
        return Err("it has no `role` that is a string");
    }
    match &message["content"] {
        Value::String(_) => Ok(()),
        Value::Null if message["tool_calls"].is_array() => Ok(()),
        Value::Array(_) => {
            Err("its `content` is a list of parts (images, sounds); only a string can be trained on")
        }
        _ => Err("it has no `content` that is a string"),
    }
}

/// The descriptions of tools: a list, or its JSON text, as tables often hold it.
fn tools(value: Value) -> Result<Value, String> {
    let parsed = match value {
        Value::String(text) => {
            serde_json::from_str(&text).map_err(|e| format!("`tools` is not JSON: {e}"))?
        }
        other => other,
    };
    match parsed {
        Value::Array(_) => Ok(parsed),
        _ => Err("`tools` is not a list".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, limit: Option<usize>) -> Rows {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_rows(file.path(), limit).unwrap()
    }

    #[test]
    fn broken_lines_come_with_their_number() {
        let text = "{\"text\":\"a\",\"language\":\"nl\"}\n\n{\"text\":3}\nnot json\n{\"prompt\":\"a\",\"completion\":\"b\"}\n\
                    {\"prompt\":\"a\"}\n{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}\n\u{fffd}";
        let rows = read(text, None).rows;
        let lines: Vec<_> = rows
            .iter()
            .filter_map(|row| row.as_ref().err().map(|(line, _)| *line))
            .collect();
        assert_eq!(lines, [3, 4, 6, 7, 8]);
        let first = rows[0].as_ref().unwrap();
        assert_eq!((first.line, first.columns["language"].as_str()), (1, Some("nl")));
        let one = read(text, Some(1));
        assert_eq!((one.rows.len(), one.beyond_limit), (1, 6));
    }

    #[test]
    fn tools_are_taken_and_parts_are_refused_by_name() {
        let message =
            |json: &str| format!("{{\"messages\":[{json},{{\"role\":\"assistant\",\"content\":\"x\"}}]}}\n");
        let call = r#"{"role":"assistant","content":null,"tool_calls":[{"type":"function"}]}"#;
        let parts = r#"{"role":"user","content":[{"type":"image"}]}"#;
        let rows = read(
            &(message(call) + &message(parts) + &message(r#"{"role":"user"}"#)),
            None,
        )
        .rows;
        assert!(rows[0].is_ok());
        assert!(
            rows[1]
                .as_ref()
                .unwrap_err()
                .1
                .contains("message 1: its `content` is a list of parts")
        );
        assert!(rows[2].is_err());

        let tools = |json: &str| {
            read(
                &format!("{{\"text\":\"a\",\"messages\":null,\"tools\":{json}}}"),
                None,
            )
            .rows
        };
        let list = serde_json::json!([{"name": "f"}]);
        assert_eq!(
            tools("[{\"name\":\"f\"}]")[0].as_ref().unwrap().tools,
            Some(list.clone())
        );
        assert_eq!(
            tools(r#""[{\"name\":\"f\"}]""#)[0].as_ref().unwrap().tools,
            Some(list)
        );
        assert_eq!(tools("null")[0].as_ref().unwrap().tools, None);
        assert!(tools("\"f\"")[0].is_err() && tools("{}")[0].is_err());
    }
}

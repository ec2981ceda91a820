//! Admin commands: what arrives on `cmd/{verb}`, and what is said back.
//!
//! They have topics of their own, so that a broker's access list can close them, and a device that was not told to
//! listen to them does not subscribe.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::topics::valid_id;

/// `cmd/model`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelAction {
    /// Fetch a model and, when all is well with it, serve it.
    Install {
        /// http(s)://…/manifest.json
        url: String,
    },
    /// Serve an installed model.
    Activate {
        /// Its id.
        model: String,
    },
    /// Serve the model before again.
    Rollback {},
    /// Say what is installed.
    List {},
}

/// `cmd/erase`: everything of one client, or one request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(extend("oneOf" = [{"required": ["client"]}, {"required": ["request"]}])))]
#[serde(deny_unknown_fields, default)]
pub struct Erase {
    /// The client as the queue has it: its reply topic up to the first level below the allowed prefix
    /// (`reply/kitchen`), or a whole reply topic.
    #[cfg_attr(test, schemars(with = "String"))]
    pub client: Option<String>,
    /// The id of a request, whoever sent it.
    #[cfg_attr(test, schemars(with = "String"))]
    pub request: Option<String>,
}

impl Erase {
    /// Whether it says what is to be erased, and only once.
    pub fn names_one(&self) -> bool {
        self.client.is_some() != self.request.is_some()
    }
}

/// `cmd/drain`: leave the pool, or come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// Take requests of the pool again.
    pub join: bool,
}

/// What every command has besides its own fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The command's name, for its answer.
    pub id: String,
    /// Where the answer goes.
    pub reply_to: Option<String>,
}

/// An answer to a command that was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CommandAnswer {
    /// The command's id.
    pub id: String,
    /// Its verb.
    pub command: String,
    /// What was done.
    pub result: Value,
}

/// Reads a command: JSON with `id` and `reply_to` beside the verb's own fields.
///
/// # Errors
/// What is wrong, with as much of the envelope as could be read.
pub fn parse<T: serde::de::DeserializeOwned>(
    payload: &[u8],
    made: &str,
) -> Result<(Envelope, T), (Envelope, String)> {
    let mut envelope = Envelope {
        id: made.to_owned(),
        reply_to: None,
    };
    let mut value: Value = match serde_json::from_slice(payload) {
        Ok(value) => value,
        Err(error) => return Err((envelope, format!("the command is not JSON: {error}"))),
    };
    let Some(body) = value.as_object_mut() else {
        return Err((envelope, "the command must be a JSON object".to_owned()));
    };
    match body.remove("id") {
        None => {}
        Some(Value::String(id)) if valid_id(&id) => envelope.id = id,
        Some(_) => return Err((envelope, "`id` must match [A-Za-z0-9_.-]{1,64}".to_owned())),
    }
    match body.remove("reply_to") {
        None => {}
        Some(Value::String(topic)) => envelope.reply_to = Some(topic),
        Some(_) => return Err((envelope, "`reply_to` must be a string".to_owned())),
    }
    match serde_json::from_value(value) {
        Ok(command) => Ok((envelope, command)),
        Err(error) => Err((envelope, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let parsed = parse::<ModelAction>(
            br#"{"action":"install","url":"http://h/m.json","id":"a"}"#,
            "made",
        );
        let (envelope, action) = parsed.unwrap();
        assert_eq!(envelope.id, "a");
        assert_eq!(
            action,
            ModelAction::Install {
                url: "http://h/m.json".to_owned()
            }
        );
        let (envelope, action) =
            parse::<ModelAction>(br#"{"action":"rollback","reply_to":"reply/x"}"#, "made").unwrap();
        assert_eq!(
            (envelope.id.as_str(), envelope.reply_to.as_deref()),
            ("made", Some("reply/x"))
        );
        assert_eq!(action, ModelAction::Rollback {});
    }

    #[test]
    fn what_is_no_command_says_why() {
        for (payload, why) in [
            (&b"rollback"[..], "not JSON"),
            (b"[]", "object"),
            (b"{\"action\":\"erase\"}", "erase"),
            (b"{\"action\":\"install\"}", "url"),
            (b"{\"action\":\"rollback\",\"force\":true}", "force"),
            (b"{\"action\":\"rollback\",\"id\":\"a/b\"}", "id"),
        ] {
            let (_, message) = parse::<ModelAction>(payload, "made").unwrap_err();
            assert!(message.contains(why), "{message}");
        }
    }
}

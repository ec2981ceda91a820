//! Topic names of wire version 1, and the rule for the topic of an answer.
//!
//! In: root and device from the configuration. Out: topic strings. Source: the MQTT 5 specification, section
//! 4.7 (topic names and filters); the topic table of docs/protocol.

/// Longest device or request id, in bytes.
pub const ID_BYTES: usize = 64;
/// Longest reply topic that is accepted, in bytes.
pub const REPLY_TOPIC_BYTES: usize = 256;

/// Whether `id` is a device or request id: `[A-Za-z0-9_.-]{1,64}`.
pub fn valid_id(id: &str) -> bool {
    (1..=ID_BYTES).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// What stands in place of a reply topic for who asks at the device's own door (HTTP). No message can name it: reply topics
/// never begin with `$`.
const DOOR: &str = "$http";

/// The place of a client at the door, in the form of a reply topic: `$http/NAME`, or `$http` for those without a name.
pub fn at_door(client: Option<&str>) -> String {
    match client {
        Some(client) => format!("{DOOR}/{client}"),
        None => DOOR.to_owned(),
    }
}

/// Whether a place is at the door, and not at the broker.
pub fn is_at_door(topic: &str) -> bool {
    under(topic, DOOR)
}

/// The topics of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topics {
    root: String,
    base: String,
}

impl Topics {
    /// Topics under `{root}/v1/{device}`. The caller has checked both names.
    pub fn new(root: &str, device: &str) -> Self {
        Self {
            root: root.to_owned(),
            base: format!("{root}/v1/{device}"),
        }
    }

    /// Requests come in here.
    pub fn request(&self) -> String {
        format!("{}/req", self.base)
    }

    /// `{"id": …}` comes in here.
    pub fn cancel(&self) -> String {
        format!("{}/cancel", self.base)
    }

    /// Admin commands come in here, each verb on a level of its own.
    pub fn commands(&self) -> String {
        format!("{}/cmd/+", self.base)
    }

    /// Commands of one verb come in here.
    pub fn command(&self, verb: &str) -> String {
        format!("{}/cmd/{verb}", self.base)
    }

    /// The verb of a topic that is a command's.
    pub fn command_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        topic.strip_prefix(&self.base)?.strip_prefix("/cmd/")
    }

    /// Payloads for tasks come in here, each task on a level of its own.
    pub fn tasks(&self) -> String {
        format!("{}/task/+", self.base)
    }

    /// Payloads for one task come in here.
    pub fn task(&self, name: &str) -> String {
        format!("{}/task/{name}", self.base)
    }

    /// The name of a topic that is a task's.
    pub fn task_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        topic.strip_prefix(&self.base)?.strip_prefix("/task/")
    }

    /// State of the device; retained, and the will.
    pub fn status(&self) -> String {
        format!("{}/status", self.base)
    }

    /// What the device is and serves; retained.
    pub fn card(&self) -> String {
        format!("{}/card", self.base)
    }

    /// Counters, at QoS 0.
    pub fn metrics(&self) -> String {
        format!("{}/metrics", self.base)
    }

    /// Answers to a request that named no reply topic.
    pub fn answer(&self, id: &str) -> String {
        format!("{}/res/{id}", self.base)
    }

    /// Who asks, as far as fairness between clients goes: MQTT does not say who published a message, so it is the reply
    /// topic, up to the first level below the allowed prefix (`reply/kitchen/17` is `reply/kitchen`). All who name no
    /// reply topic are one.
    pub fn client(&self, reply_topic: &str, prefixes: &[String]) -> String {
        if under(reply_topic, &self.base) {
            return self.base.clone();
        }
        if is_at_door(reply_topic) {
            return reply_topic.to_owned();
        }
        let prefix = prefixes
            .iter()
            .filter(|prefix| under(reply_topic, prefix))
            .map(|prefix| prefix.trim_end_matches('/').len())
            .max()
            .unwrap_or(0);
        let below = reply_topic.get(prefix..).unwrap_or_default();
        let level = below.trim_start_matches('/').find('/');
        let skipped = below.len() - below.trim_start_matches('/').len();
        let end = level.map_or(reply_topic.len(), |level| prefix + skipped + level);
        reply_topic.get(..end).unwrap_or(reply_topic).to_owned()
    }

    /// Decides whether an answer may go to `topic`.
    ///
    /// Without this rule anyone who may send a request could make the device publish wherever the device's
    /// own rights reach. Allowed are the device's own `res/…` and whatever lies under one of `prefixes` (whole
    /// topic levels: `reply` allows `reply` and `reply/me`, not `replying`). Never allowed: wildcards, `$`
    /// topics, anything else under `{root}/`.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the topic.
    pub fn check_reply(&self, topic: &str, prefixes: &[String]) -> Result<(), &'static str> {
        if topic.is_empty() || topic.len() > REPLY_TOPIC_BYTES {
            return Err("the reply topic must have 1 to 256 bytes");
        }
        if topic.contains(['+', '#']) || topic.chars().any(char::is_control) {
            return Err("the reply topic must not contain wildcards or control characters");
        }
        if topic.starts_with('$') {
            return Err("the reply topic must not begin with `$`");
        }
        if let Some(rest) = topic
            .strip_prefix(&self.base)
            .and_then(|rest| rest.strip_prefix("/res/"))
        {
            return if rest.is_empty() {
                Err("the reply topic ends after `res/`")
            } else {
                Ok(())
            };
        }
        if under(topic, &self.root) {
            return Err("the reply topic must not lie under the device's own topics");
        }
        if prefixes.iter().any(|prefix| under(topic, prefix)) {
            return Ok(());
        }
        Err("the reply topic is not under an allowed prefix ([reply] prefixes in the device's configuration)")
    }
}

/// Whether `topic` is `prefix` or lies below it.
fn under(topic: &str, prefix: &str) -> bool {
    let prefix = prefix.trim_end_matches('/');
    topic
        .strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert!(valid_id("a.B-9_"));
        assert!(valid_id(&"x".repeat(64)));
        for bad in ["", "a/b", "a b", "ü", "+", "#", &"x".repeat(65)] {
            assert!(!valid_id(bad), "{bad}");
        }
    }

    #[test]
    fn clients() {
        let topics = Topics::new("pipit", "dev");
        let prefixes = ["reply/".to_owned(), "home/floor".to_owned()];
        for (topic, client) in [
            ("reply/kitchen/17", "reply/kitchen"),
            ("reply/kitchen", "reply/kitchen"),
            ("reply", "reply"),
            ("home/floor/2/x/y", "home/floor/2"),
            ("pipit/v1/dev/res/a", "pipit/v1/dev"),
            ("pipit/v1/dev/res/b", "pipit/v1/dev"),
            (&at_door(None), "$http"),
            (&at_door(Some("kitchen")), "$http/kitchen"),
        ] {
            assert_eq!(topics.client(topic, &prefixes), client);
        }
    }

    #[test]
    fn reply_topics() {
        let topics = Topics::new("pipit", "dev");
        let prefixes = ["reply/".to_owned(), "home".to_owned()];
        for good in [
            "reply/me",
            "reply",
            "home/a/b",
            "pipit/v1/dev/res/x",
            "pipit/v1/dev/res/a/b",
        ] {
            assert_eq!(topics.check_reply(good, &prefixes), Ok(()), "{good}");
        }
        let long = format!("reply/{}", "x".repeat(300));
        for bad in [
            "",
            "replying/me",
            "other",
            "reply/+",
            "reply/#",
            "$SYS/x",
            &at_door(Some("kitchen")),
            "pipit/v1/dev/req",
            "pipit/v1/dev/res/",
            "pipit/v1/other/req",
            "pipit/v1/other/res/x",
            "pipit",
            "reply/\u{0}",
            &long,
        ] {
            assert!(topics.check_reply(bad, &prefixes).is_err(), "{bad}");
        }
        // A prefix that was meant to open everything does not open the device's own topics.
        assert!(
            topics
                .check_reply("pipit/v1/dev/cmd/x", &["pipit".to_owned()])
                .is_err()
        );
    }
}

//! A pool: devices that share one request topic. Its topics, and what its members say to each other.
//!
//! In: root, pool and device from the configuration. Out: topic strings, payloads. The broker gives each request to one
//! member (MQTT 5, 4.8.2, shared subscriptions). It does so without asking who has room, so the members pass on to each
//! other what they cannot run soon.

use serde::{Deserialize, Serialize};

use super::Topics;

/// The topics of one member of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolTopics {
    /// Those that a client knows: the pool in place of a device.
    shared: Topics,
    base: String,
    pool: String,
    device: String,
}

impl PoolTopics {
    /// Topics under `{root}/v1/pool/{pool}`. The caller has checked all names.
    pub fn new(root: &str, pool: &str, device: &str) -> Self {
        Self {
            shared: Topics::new(root, &format!("pool/{pool}")),
            base: format!("{root}/v1/pool/{pool}"),
            pool: pool.to_owned(),
            device: device.to_owned(),
        }
    }

    /// Requests, their cancellation and their answers, as if the pool were a device.
    pub fn shared(&self) -> &Topics {
        &self.shared
    }

    /// The filter by which each request goes to one member.
    pub fn share(&self) -> String {
        format!("$share/{}/{}", self.pool, self.shared.request())
    }

    /// What a member says of itself; retained, and its will.
    pub fn member(&self, device: &str) -> String {
        format!("{}/member/{device}", self.base)
    }

    /// Who it is that says something of itself on this topic.
    pub fn member_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        topic.strip_prefix(&self.base)?.strip_prefix("/member/")
    }

    /// Here this device, or another one, is asked to give away what it holds.
    pub fn give(&self, device: &str) -> String {
        format!("{}/give/{device}", self.base)
    }

    /// Here this device, or another one, is given requests.
    pub fn take(&self, device: &str) -> String {
        format!("{}/take/{device}", self.base)
    }

    /// Which requests another member has fetched from the session of this one; retained until it is back.
    pub fn fetched(&self, device: &str) -> String {
        format!("{}/fetched/{device}", self.base)
    }

    /// Whose requests this topic is about.
    pub fn fetched_of<'a>(&self, topic: &'a str) -> Option<&'a str> {
        topic.strip_prefix(&self.base)?.strip_prefix("/fetched/")
    }

    /// Here a member that has fetched requests is told which of them others know.
    pub fn known(&self, device: &str) -> String {
        format!("{}/known/{device}", self.base)
    }

    /// What this member listens to beside the shared subscription.
    pub fn own(&self) -> [String; 4] {
        [
            self.give(&self.device),
            self.take(&self.device),
            self.known(&self.device),
            self.shared.cancel(),
        ]
    }

    /// What this member listens to, and wants what is retained of it.
    pub fn retained(&self) -> [String; 2] {
        [self.member("+"), self.fetched("+")]
    }

    /// Whether a topic is one of the pool's.
    pub fn has(&self, topic: &str) -> bool {
        topic
            .strip_prefix(&self.base)
            .is_some_and(|rest| rest.starts_with('/'))
    }
}

/// Where a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Membership {
    /// It takes requests.
    In,
    /// It takes no more, and gives back what it has not begun.
    Leaving,
    /// It is away, and the broker may hold requests for it: another member fetches them.
    Gone,
}

/// `member/{device}`, retained: what a member of a pool says of itself. Nothing is retained of one that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Member {
    /// Where it stands.
    pub state: Membership,
    /// Requests that it holds and has not taken: whoever has room may ask for them.
    pub held: u64,
}

/// `give/{device}`: a member with room asks another one for requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Give {
    /// Who asks.
    pub device: String,
    /// For how many it has room.
    pub places: u64,
}

/// `fetched/{device}`, retained, and `known/{device}`: requests that the broker had sent to a member before it was gone.
/// They have names that tell nothing of them: whoever knows the request knows its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// Who says so.
    pub by: String,
    /// 32 hexadecimal digits each.
    pub names: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_of_a_pool() {
        let topics = PoolTopics::new("pipit", "all", "kitchen");
        assert_eq!(topics.share(), "$share/all/pipit/v1/pool/all/req");
        assert_eq!(topics.shared().answer("a"), "pipit/v1/pool/all/res/a");
        assert_eq!(topics.member_of("pipit/v1/pool/all/member/hall"), Some("hall"));
        assert_eq!(topics.member_of("pipit/v1/pool/other/member/hall"), None);
        assert!(topics.has("pipit/v1/pool/all/take/kitchen"));
        assert!(!topics.has("pipit/v1/pool/all2/req") && !topics.has("pipit/v1/kitchen/req"));
        let answers = topics.shared().check_reply("pipit/v1/pool/all/res/a", &[]);
        assert_eq!(answers, Ok(()));
    }
}

//! How a connection begins: options of the daemon become the client's.

use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v5::{LastWill, LastWillProperties};
use rumqttc::{AckMode, MqttOptions, Transport};

use super::session::EmptySession;
use super::{LinkError, Options, Tls};

/// TCP, with TLS where that is asked for.
pub(super) fn transport(options: &Options) -> Result<Transport, LinkError> {
    match &options.tls {
        None => Ok(Transport::tcp()),
        Some(Tls { ca: None, .. }) => {
            Transport::try_tls_with_default_config().map_err(|error| LinkError::Tls(error.to_string()))
        }
        Some(Tls {
            ca: Some(path),
            client,
        }) => {
            let ca = std::fs::read(path).map_err(|source| LinkError::Ca {
                path: path.clone(),
                source,
            })?;
            Ok(Transport::tls(ca, client.clone(), None))
        }
    }
}

/// The CONNECT packet and the socket.
pub(super) fn mqtt_options(options: &Options, transport: Transport) -> MqttOptions {
    let mut mqtt = MqttOptions::new(&options.client_id, (options.host.as_str(), options.port));
    mqtt.set_transport(transport)
        .set_keep_alive(options.keep_alive_s)
        .set_ack_mode(AckMode::Manual)
        .set_receive_maximum(Some(options.receive_maximum.max(1)))
        .set_max_packet_size(Some(options.most_packet_bytes))
        .set_outgoing_inflight_upper_limit(32)
        .set_clean_start(options.session_expiry_s == 0)
        .set_session_expiry_interval(Some(options.session_expiry_s));
    let mut network = mqtt.network_options();
    network.set_tcp_nodelay(true);
    mqtt.set_network_options(network);
    if options.session_expiry_s > 0 {
        mqtt.set_session_store(EmptySession {
            expiry_s: options.session_expiry_s,
        });
    }
    if let Some((user, password)) = &options.login {
        mqtt.set_credentials(user.clone(), password.clone());
    }
    if let Some((topic, payload)) = &options.will {
        // A short absence is not announced.
        let properties = LastWillProperties {
            delay_interval: Some(5),
            payload_format_indicator: Some(1),
            message_expiry_interval: None,
            content_type: Some("application/json".to_owned()),
            response_topic: None,
            correlation_data: None,
            user_properties: Vec::new(),
        };
        let payload = payload.clone();
        mqtt.set_last_will(LastWill::new(
            topic,
            payload,
            QoS::AtLeastOnce,
            true,
            Some(properties),
        ));
    }
    mqtt
}

// Ask a Pipit device over MQTT 3.1.1: node ask_311.mjs DEVICE PROMPT [--help]
// The answer comes to the device's own topic pipit/v1/DEVICE/res/ID, or to --reply-to. It goes to stdout, the chunks
// of a streamed one to stderr. Ctrl-C takes the request back.
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import mqtt from 'mqtt';

const usage = `usage: node ask_311.mjs DEVICE PROMPT [--host H] [--port P] [--reply-to TOPIC] [--stream]
         [--max-tokens N] [--deadline-ms MS] [--schema FILE] [--timeout SECONDS]`;
const { values: args, positionals: [device, prompt] } = parseArgs({
    allowPositionals: true,
    options: {
        host: { type: 'string', default: 'localhost' },
        port: { type: 'string', default: '1883' },
        'reply-to': { type: 'string' },
        stream: { type: 'boolean', default: false },
        'max-tokens': { type: 'string', default: '100' },
        'deadline-ms': { type: 'string' },
        schema: { type: 'string' },
        timeout: { type: 'string', default: '60' },
        help: { type: 'boolean', short: 'h', default: false },
    },
});
if (args.help || !prompt) {
    console.error(usage);
    process.exit(args.help ? 0 : 2);
}

const base = `pipit/v1/${device}`;
// OpenAI's chat-completions body with a few fields more (docs/reference/request.schema.json).
const request = {
    id: randomUUID(),
    messages: [{ role: 'user', content: prompt }],
    max_tokens: Number(args['max-tokens']),
    temperature: 0,
    stream: args.stream,
};
if (args['reply-to']) request.reply_to = args['reply-to'];
if (args['deadline-ms']) request.deadline_ms = Number(args['deadline-ms']);
if (args.schema) {
    const schema = JSON.parse(readFileSync(args.schema, 'utf8'));
    request.response_format = { type: 'json_schema', json_schema: { name: 'answer', schema } };
}

const client = mqtt.connect(`mqtt://${args.host}:${args.port}`, { protocolVersion: 4 });

client.on('message', (topic, payload) => {
    const answer = JSON.parse(payload);
    if (answer.id !== request.id) return;
    if (answer.object === 'chat.completion.chunk') {
        // A gap in seq is a lost chunk, 0 again is a new beginning: the whole answer follows in any case.
        console.error(`chunk ${answer.seq}: ${JSON.stringify(answer.choices[0].delta.content)}`);
        return;
    }
    clearTimeout(timer);
    if (answer.error) {
        console.error(`${answer.error.code}: ${answer.error.message}`);
        process.exitCode = 1;
    } else {
        console.log(answer.choices[0].message.content);
    }
    client.end();
});

// Nobody waits any longer: the device need not work for it. It answers `cancelled`.
function cancel() {
    client.publish(`${base}/cancel`, JSON.stringify({ id: request.id }), { qos: 1 });
}
const timer = setTimeout(cancel, 1000 * Number(args.timeout));
process.once('SIGINT', cancel);

// Subscribed first: an answer could be faster than the subscription. After a lost connection this sends the same
// request again; its id makes that safe.
client.on('connect', async () => {
    await client.subscribeAsync(args['reply-to'] ?? `${base}/res/${request.id}`, { qos: 1 });
    await client.publishAsync(`${base}/req`, JSON.stringify(request), { qos: 1 });
});

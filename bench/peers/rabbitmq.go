package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"tercet.dev/tercet/bench"
)

// rabbitMQ is Debian's package: quorum queues on three nodes, with publisher confirms.
type rabbitMQ struct{}

// The package's wrapper in the path insists on a user of its own.
var rabbitScripts = []string{"/usr/lib/rabbitmq/bin/rabbitmq-server"}

func (rabbitMQ) name() string { return "rabbitmq" }

func (rabbitMQ) promise() string {
	return "quorum queues, publisher confirms: on the disks of two of three; acknowledgements of consumers are not confirmed; the emulator does not busy-wait"
}

func (rabbitMQ) missing() string {
	if _, err := which(rabbitScripts...); err != nil {
		return "apt-get install rabbitmq-server"
	}
	if _, err := which("epmd"); err != nil {
		return "apt-get install erlang-base"
	}
	return ""
}

type rabbitCluster struct {
	epmd  *process
	nodes []*process
	beams map[string]int
	urls  []string
	text  string
}

func (rabbitMQ) start(ctx context.Context, h *host, dir string) (cluster, error) {
	binary, err := which(rabbitScripts...)
	if err != nil {
		return nil, err
	}
	epmd, err := which("epmd")
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(1 + 2*3)
	if err != nil {
		return nil, err
	}
	c := &rabbitCluster{beams: map[string]int{}}
	fail := func(err error) (cluster, error) { c.stop(); return nil, err }
	c.epmd, err = h.start(dir, "epmd", nil, epmd, "-port", strconv.Itoa(ports[0]), "-address", "127.0.0.1")
	if err != nil {
		return nil, err
	}
	if err := c.epmd.await(ctx, "it listened", func() error { return dialable(loopback(ports[0])) }); err != nil {
		return fail(err)
	}
	files := map[string]string{".erlang.cookie": "tercetbench", "enabled_plugins": "[].\n", "env.conf": ""}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o400); err != nil {
			return fail(err)
		}
	}
	var formation strings.Builder
	formation.WriteString("cluster_formation.peer_discovery_backend = classic_config\n")
	for i := range 3 {
		fmt.Fprintf(&formation, "cluster_formation.classic_config.nodes.%d = rabbit%d@localhost\n", i+1, i+1)
	}
	environment := func(i int) []string {
		name := fmt.Sprintf("rabbit%d", i+1)
		own := func(file string) string { return filepath.Join(dir, name, file) }
		return []string{
			"HOME=" + dir, "ERL_EPMD_PORT=" + strconv.Itoa(ports[0]), "ERL_EPMD_ADDRESS=127.0.0.1",
			"RABBITMQ_NODENAME=" + name + "@localhost", "RABBITMQ_DIST_PORT=" + strconv.Itoa(ports[2*i+2]),
			"RABBITMQ_CONF_ENV_FILE=" + filepath.Join(dir, "env.conf"), "RABBITMQ_CONFIG_FILE=" + filepath.Join(dir, name+".conf"),
			"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(dir, "enabled_plugins"),
			"RABBITMQ_MNESIA_BASE=" + own("mnesia"), "RABBITMQ_LOG_BASE=" + own("log"), "RABBITMQ_GENERATED_CONFIG_DIR=" + own("config"),
			"RABBITMQ_FEATURE_FLAGS_FILE=" + own("feature_flags"), "RABBITMQ_PID_FILE=" + own("pid"), "RABBITMQ_SCHEMA_DIR=" + own("schema"),
			"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +sbwtdcpu none +sbwtdio none",
		}
	}
	for i := range 3 {
		name := fmt.Sprintf("rabbit%d", i+1)
		config := fmt.Sprintf("listeners.tcp.1 = %s\nlog.file.level = error\nvm_memory_high_watermark.absolute = 2GB\ndisk_free_limit.absolute = 1GB\n%s",
			loopback(ports[2*i+1]), formation.String())
		if err := os.WriteFile(filepath.Join(dir, name+".conf"), []byte(config), 0o600); err != nil {
			return fail(err)
		}
		p, err := h.start(dir, name, environment(i), binary)
		if err != nil {
			return fail(err)
		}
		c.nodes = append(c.nodes, p)
		c.urls = append(c.urls, fmt.Sprintf("amqp://guest:guest@%s/", loopback(ports[2*i+1])))
		// One after the other: the first makes the cluster, and the others join what they find.
		err = p.await(ctx, "it took connections", func() error {
			conn, err := amqp.DialConfig(c.urls[i], amqp.Config{Heartbeat: time.Minute, Locale: "en_US", Dial: amqp.DefaultDial(2 * time.Second)})
			if err != nil {
				return err
			}
			if c.text == "" {
				c.text = fmt.Sprintf("RabbitMQ %v, %v", conn.Properties["version"], conn.Properties["platform"])
			}
			return conn.Close()
		})
		if err != nil {
			return fail(err)
		}
		if c.beams[name], err = childNamed(p.pid(), "beam.smp"); err != nil {
			return fail(err)
		}
	}
	control, err := which(filepath.Join(filepath.Dir(binary), "rabbitmqctl"))
	if err != nil {
		return fail(err)
	}
	p, err := h.start(dir, "rabbitmqctl", environment(0), control, "-n", "rabbit1@localhost", "await_online_nodes", "3", "--timeout", "60")
	if err != nil {
		return fail(err)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.stop(0)
	}
	if p.err != nil {
		return fail(fmt.Errorf("the nodes did not find each other: %w: %s", p.err, p.tail()))
	}
	return c, nil
}

// childNamed finds the process with a program's name in the group of pid, which may be that process itself.
func childNamed(pid int, name string) (int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, file := range stats {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		own, rest, ok := strings.Cut(string(text), " (")
		command, rest, ok2 := strings.Cut(rest, ") ")
		fields := strings.Fields(rest) // state, parent, group
		if !ok || !ok2 || command != name || len(fields) < 3 || fields[2] != strconv.Itoa(pid) {
			continue
		}
		return strconv.Atoi(own)
	}
	return 0, fmt.Errorf("no process %s in the group of %d", name, pid)
}

func (c *rabbitCluster) version() string      { return c.text }
func (c *rabbitCluster) pids() map[string]int { return c.beams }
func (c *rabbitCluster) stop() {
	stopAll(0, c.nodes...)
	stopAll(0, c.epmd)
}

// dial opens a connection with one channel.
func (c *rabbitCluster) dial() (*amqp.Connection, *amqp.Channel, error) {
	// The first node declares the queues, and so leads them.
	conn, err := amqp.Dial(c.urls[0])
	if err != nil {
		return nil, nil, err
	}
	ch, err := conn.Channel()
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, ch, nil
}

// queueName names the queue of a topic and a group: each group has a queue of its own.
func queueName(topic, group string) string {
	if group == "" {
		return topic
	}
	return topic + "." + group
}

// queuesOf lists the queues of a topic.
func queuesOf(w bench.Workload, topic string) []string {
	if len(groupsOf(w)) == 0 {
		return []string{queueName(topic, "")}
	}
	var names []string
	for _, group := range groupsOf(w) {
		names = append(names, queueName(topic, group))
	}
	return names
}

func (c *rabbitCluster) run(ctx context.Context, w bench.Workload, _ string, hooks bench.Hooks) (*bench.Result, error) {
	conn, ch, err := c.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	for _, topic := range topicsOf(w) {
		if err := ch.ExchangeDeclare(topic, amqp.ExchangeFanout, true, false, false, false, nil); err != nil {
			return nil, err
		}
		for _, queue := range queuesOf(w, topic) {
			_, err := ch.QueueDeclare(queue, true, false, false, false, amqp.Table{
				"x-queue-type": "quorum", "x-quorum-initial-group-size": 3, "x-message-ttl": 60_000,
			})
			if err != nil {
				return nil, err
			}
			if err := ch.QueueBind(queue, "", topic, false, nil); err != nil {
				return nil, err
			}
		}
	}
	return bench.Run(ctx, w, &rabbitDriver{c: c, w: w}, hooks)
}

func (c *rabbitCluster) clean(_ context.Context, w bench.Workload) error {
	conn, ch, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, topic := range topicsOf(w) {
		for _, queue := range queuesOf(w, topic) {
			if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
				return err
			}
		}
		if err := ch.ExchangeDelete(topic, false, false); err != nil {
			return err
		}
	}
	return nil
}

type rabbitDriver struct {
	c *rabbitCluster
	w bench.Workload
}

// Publisher implements bench.Driver.
func (d *rabbitDriver) Publisher(i int) (bench.Publisher, error) {
	conn, ch, err := d.c.dial()
	if err != nil {
		return nil, err
	}
	if err := ch.Confirm(false); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &rabbitPublisher{conn: conn, ch: ch, direct: len(groupsOf(d.w)) <= 1, w: d.w, feed: bench.NewBodies(d.w, i)}, nil
}

type rabbitPublisher struct {
	conn *amqp.Connection
	ch   *amqp.Channel
	// direct publishes to the only queue without the exchange.
	direct bool
	w      bench.Workload
	feed   *bench.Bodies
	wait   *inOrder[*amqp.DeferredConfirmation]
}

// send hands the next request over.
func (p *rabbitPublisher) send(ctx context.Context, due time.Time) ([]*amqp.DeferredConfirmation, error) {
	topic, bodies := p.feed.Next(due)
	exchange, key := topic, ""
	if p.direct {
		exchange, key = "", queuesOf(p.w, topic)[0]
	}
	confirms := make([]*amqp.DeferredConfirmation, len(bodies))
	for i, body := range bodies {
		var err error
		confirms[i], err = p.ch.PublishWithDeferredConfirmWithContext(ctx, exchange, key, false, false, amqp.Publishing{
			DeliveryMode: amqp.Persistent, ContentType: "application/octet-stream", Body: body,
		})
		if err != nil {
			return nil, err
		}
	}
	return confirms, nil
}

func awaitConfirm(ctx context.Context, c *amqp.DeferredConfirmation) error {
	ok, err := c.WaitContext(ctx)
	if err == nil && !ok {
		err = errors.New("the server refused a message")
	}
	return err
}

// Publish implements bench.Publisher.
func (p *rabbitPublisher) Publish(ctx context.Context, due time.Time) (bench.Ack, error) {
	confirms, err := p.send(ctx, due)
	if err != nil {
		return bench.Ack{}, err
	}
	for _, c := range confirms {
		if err := awaitConfirm(ctx, c); err != nil {
			return bench.Ack{}, err
		}
	}
	return p.feed.Ack(2), nil
}

// Send implements bench.Pipeline.
func (p *rabbitPublisher) Send(ctx context.Context, due time.Time, done func(bench.Ack, error)) error {
	if p.wait == nil {
		p.wait = newInOrder(ctx, awaitConfirm)
	}
	confirms, err := p.send(ctx, due)
	if err != nil {
		return err
	}
	p.wait.add(confirms, p.feed.Ack(2), done)
	return nil
}

// Close implements bench.Publisher.
func (p *rabbitPublisher) Close() error {
	err := p.conn.Close()
	if p.wait != nil {
		p.wait.close()
	}
	return err
}

// Consumer implements bench.Driver.
func (d *rabbitDriver) Consumer(i int, found func(body []byte)) (bench.Consumer, error) {
	topic, group := d.w.Consumes(i)
	conn, ch, err := d.c.dial()
	if err != nil {
		return nil, err
	}
	if err := ch.Qos(prefetch, 0, false); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	arrived, err := ch.Consume(queueName(topic, group), "", false, false, false, false, nil)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return &rabbitConsumer{conn: conn, ch: ch, arrived: arrived, found: found}, nil
}

type rabbitConsumer struct {
	conn    *amqp.Connection
	ch      *amqp.Channel
	arrived <-chan amqp.Delivery
	found   func(body []byte)
	leased  []amqp.Delivery
}

// Receive implements bench.Consumer.
func (c *rabbitConsumer) Receive(ctx context.Context) (int, error) {
	c.leased = gather(ctx, c.arrived, c.leased[:0])
	for i := range c.leased {
		if c.found != nil {
			c.found(c.leased[i].Body)
		}
	}
	return len(c.leased), nil
}

// Settle implements bench.Consumer. The protocol has no answer to an acknowledgement.
func (c *rabbitConsumer) Settle(context.Context) (int, error) {
	if err := c.ch.Ack(c.leased[len(c.leased)-1].DeliveryTag, true); err != nil {
		return 0, err
	}
	return len(c.leased), nil
}

// Close implements bench.Consumer.
func (c *rabbitConsumer) Close() error { return c.conn.Close() }
